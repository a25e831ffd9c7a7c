#!/bin/sh
# Builds a TensorRT engine of each model in this folder, times them in turn and compares their outputs. See README.md.
#
#   sh build.sh [--force] [--tf32] [--rounds N] [--seconds S] [--build-only] [--keep-times]
#
# --keep-times goes on with a run that was cut off, where it was. TRTEXEC=/path/to/trtexec chooses the program.
# Everything is written below results/.
set -u

here=$(dirname "$0")
cd "$here" || exit 1
if [ ! -r settings.sh ] || [ ! -r manifest.json ]; then
    echo "build.sh: settings.sh or manifest.json is missing: copy the whole folder" >&2
    exit 1
fi
# shellcheck source=/dev/null
. ./settings.sh
: "${TARGET:?}" "${TARGET_VERSION:?}" "${PRECISION:?}" "${MODELS:?}" "${WORKSPACES:?}"
: "${ROUNDS:?}" "${SECONDS_EACH:?}" "${ITERATIONS:?}" "${WARM_UP:?}" "${TIMES_ONLY:?}"

MEMINFO=${MEMINFO:-/proc/meminfo}
child=""
part=""
locked=""
force=0
tf32=0
build_only=0
keep_times=0

say() {
    printf '%s\n' "$*"
}

die() { # message
    printf 'build.sh: %s\n' "$*" >&2
    exit 1
}

clean_up() {
    [ -z "$part" ] || rm -f "$part"
    [ -z "$locked" ] || rm -rf results/.running
}

interrupted() {
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null
        { sleep 3; kill -KILL "$child"; } >/dev/null 2>&1 & # a process that has just begun may miss the first signal
        killer=$!
        wait "$child" 2>/dev/null
        kill "$killer" 2>/dev/null
    fi
    echo "build.sh: interrupted; finished engines stay, nothing half-written does" >&2
    exit 130
}

number() { # option value
    case $2 in
        "" | *[!0-9]* | 0*) die "$1 takes a whole number from 1 on" ;;
    esac
}

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --force) force=1 ;;
            --tf32) tf32=1 ;;
            --build-only) build_only=1 ;;
            --keep-times) keep_times=1 ;;
            --rounds | --seconds)
                number "$1" "${2:-}"
                if [ "$1" = --rounds ]; then ROUNDS=$2; else SECONDS_EACH=$2; fi
                shift
                ;;
            *) die "unknown option $1; see the first lines of build.sh" ;;
        esac
        shift
    done
    if [ "$PRECISION" != fp32 ] && [ "$tf32" = 1 ]; then
        die "--tf32 is for fp32, and this bundle is $PRECISION"
    fi
}

# One run at a time in a folder: two would write to the same files and slow each other down.
lock() {
    mkdir -p results || die "cannot write here: $(pwd)"
    if ! mkdir results/.running 2>/dev/null; then
        other=$(cat results/.running/pid 2>/dev/null)
        if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
            die "another build.sh runs in this folder (process $other)"
        fi
        rm -rf results/.running # of one that was killed
        mkdir results/.running || die "cannot write into $(pwd)/results"
    fi
    locked=1
    echo $$ >results/.running/pid
    rm -f results/*/*.part
}

find_trtexec() {
    trtexec=${TRTEXEC:-}
    if [ -n "$trtexec" ]; then
        [ -x "$trtexec" ] || die "TRTEXEC=$trtexec is not a program"
        return
    fi
    trtexec=$(command -v trtexec) && return
    for place in /usr/src/tensorrt/bin /usr/local/tensorrt/bin /opt/tensorrt/bin; do
        if [ -x "$place/trtexec" ]; then
            trtexec=$place/trtexec
            return
        fi
    done
    die "no trtexec in PATH or /usr/src/tensorrt/bin: install it (sudo apt-get install libnvinfer-bin) or set TRTEXEC"
}

as_code() { # 8.2.1 -> 80201
    printf '%s\n' "$1" | awk -F. '{ printf "%d\n", $1 * 10000 + $2 * 100 + $3 }'
}

# From trtexec's own first line; some builds print none, then from the package or the library beside it.
find_version() {
    banner=$("$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)\].*/\1/p' | head -n 1)
    if [ -n "$banner" ] && [ "$banner" -lt 10000 ]; then # v8201 until version 9, v100300 from version 10 on
        version=$((banner / 1000)).$((banner % 1000 / 100)).$((banner % 100))
    elif [ -n "$banner" ]; then
        version=$((banner / 10000)).$((banner % 10000 / 100)).$((banner % 100))
    else
        version=$(dpkg-query -W -f '${Version}\n' libnvinfer-bin 2>/dev/null |
            sed -n 's/^\([0-9]*\.[0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
    fi
    if [ -z "$version" ]; then
        for library in /usr/lib/*/libnvinfer.so.*.*.* /usr/lib/libnvinfer.so.*.*.*; do
            [ -e "$library" ] && version=${library##*libnvinfer.so.}
        done
    fi
    [ -n "$version" ] || die "cannot tell the version of $trtexec: its --help names none, and no package or library does"
    code=$(as_code "$version")
}

# Which options this trtexec knows. A version that the models were not lowered for may misread them without a word.
choose_dialect() {
    target=$(as_code "$TARGET_VERSION")
    [ "$code" -ge 80200 ] || die "TensorRT $version is here, and 8.2 is the oldest that this works with"
    if [ $((code / 100)) -lt $((target / 100)) ]; then
        die "TensorRT $version is here, and this bundle is for $TARGET_VERSION: make one for a target with tensorrt = \"$version\""
    elif [ $((code / 100)) -gt $((target / 100)) ]; then
        say "warning: TensorRT $version is here, and this bundle was made for $TARGET_VERSION: a bundle for $version may be faster"
    fi
    if [ "$code" -ge 110000 ]; then
        dialect=11
    elif [ "$code" -ge 100000 ]; then
        dialect=10
    elif [ "$code" -ge 80600 ]; then
        dialect=8.6
    elif [ "$code" -ge 80400 ]; then
        dialect=8.4
    else
        dialect=8.2
    fi
    if [ "$dialect" = 11 ] && [ "$PRECISION" = fp16 ] && [ "$target" -lt 110000 ]; then
        die "TensorRT $version takes the precision from the model: make an fp16 bundle for a target with tensorrt = \"$version\""
    fi
    say "trtexec of TensorRT $version at $trtexec (options of $dialect)"
}

megabytes() { # key of /proc/meminfo
    awk -v key="$1:" '$1 == key { print int($2 / 1024); found = 1 } END { if (!found) print -1 }' "$MEMINFO" 2>/dev/null
}

check_memory() {
    free=$(megabytes MemAvailable)
    swap=$(megabytes SwapFree)
    if [ "${free:--1}" -lt 0 ]; then
        say "free memory: not known here"
        return
    fi
    say "free memory: $free MB, free swap: $swap MB"
    if [ $((free + swap)) -lt 2000 ]; then
        say "warning: builds may be killed for lack of memory: close the desktop (sudo systemctl isolate multi-user.target)," \
            "add swap (see README.md)"
    fi
}

check_disk() {
    size=$(du -sk . | awk '{ print int($1 / 1024) }')
    room=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    need=$((2 * size + 50))
    [ "$room" -ge "$need" ] || die "$room MB are free on this disk, and about $need MB are needed: free some, or copy the folder elsewhere"
}

# What the times depend on, for results.json.
describe_device() {
    {
        if [ -r /proc/device-tree/model ]; then
            printf 'model: %s\n' "$(tr -d '\000' </proc/device-tree/model)"
        fi
        printf 'system: %s\n' "$(uname -srm)"
        if [ -r /etc/nv_tegra_release ]; then
            printf 'release: %s\n' "$(head -n 1 /etc/nv_tegra_release)"
        fi
        if command -v nvpmodel >/dev/null 2>&1; then
            printf 'power mode: %s\n' "$(nvpmodel -q 2>/dev/null | sed -n 's/^NV Power Mode: *//p' | head -n 1)"
        fi
        if command -v nvidia-smi >/dev/null 2>&1; then
            printf 'gpu: %s\n' "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
        fi
        governor=/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor
        if [ -r "$governor" ]; then printf 'cpu governor: %s\n' "$(cat "$governor")"; fi
        for folder in /sys/devices/*.gpu/devfreq/* /sys/devices/platform/*.gpu/devfreq/* /sys/class/devfreq/*gpu*; do
            [ -r "$folder/min_freq" ] || continue
            # jetson_clocks fixes the clock: the least that it may be is then the most
            printf 'gpu clock: %s to %s Hz\n' "$(cat "$folder/min_freq")" "$(cat "$folder/max_freq")"
            break
        done
        printf 'free memory: %s MB\n' "${free:-?}"
        printf 'tensorrt: %s\n' "$version"
        printf 'tf32: %s\n' "$tf32"
    } >results/device.txt.part
    mv results/device.txt.part results/device.txt
}

digest() { # file
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum "$1" | cut -d ' ' -f 1
    else
        cksum "$1" | cut -d ' ' -f 1,2
    fi
}

# Runs a program in the background, so that Ctrl-C is heard at once.
run() { # log command...
    log=$1
    shift
    pending=0
    trap 'pending=1' INT TERM HUP # until it is known what to stop
    "$@" >"$log" 2>&1 &
    child=$!
    trap interrupted INT TERM HUP
    [ "$pending" = 0 ] || interrupted
    wait "$child"
    status=$?
    child=""
    return $status
}

# An engine takes minutes; one of the same model, TensorRT and options is kept.
stamp() { # label
    say "$(digest "$1/model.onnx") TensorRT $version $PRECISION tf32=$tf32 $(uname -m)"
}

build_with() { # label workspace
    part=results/$1/model.engine.part
    label=$1
    workspace=$2
    set -- "--onnx=$label/model.onnx" "--saveEngine=$part" --profilingVerbosity=detailed \
        "--exportLayerInfo=results/$label/layers.json"
    case $dialect in
        8.2 | 8.4) set -- "$@" --buildOnly ;;
        *) set -- "$@" --skipInference ;;
    esac
    if [ "$workspace" != 0 ] && [ "$dialect" = 8.2 ]; then
        set -- "$@" "--workspace=$workspace"
    elif [ "$workspace" != 0 ]; then
        set -- "$@" "--memPoolSize=workspace:$workspace"
    fi
    if [ "$PRECISION" = fp16 ] && [ "$dialect" != 11 ]; then set -- "$@" --fp16; fi
    if [ "$PRECISION" = fp16 ] && [ "$dialect" != 8.2 ] && [ "$dialect" != 11 ] && [ -f "$label/precisions.txt" ]; then
        set -- "$@" --precisionConstraints=obey "--layerPrecisions=$(cat "$label/precisions.txt")"
    fi
    if [ "$PRECISION" = fp32 ] && [ "$tf32" = 0 ]; then set -- "$@" --noTF32; fi
    run "results/$label/build.log" "$trtexec" "$@"
}

ran_out_of_memory() { # status log
    [ "$1" = 137 ] && return 0 # killed, as the kernel does
    grep -qiE 'out ?of ?memory|insufficient memory|cuda failure: 2|bad_alloc|cannot allocate memory|enough (free )?memory' "$2"
}

first_error() { # log
    grep -E '\[E\]|rror:' "$1" | head -n 1 | sed 's/^.*\[E\] */: /' | cut -c 1-300
}

build() { # label
    folder=results/$1
    mkdir -p "$folder"
    if [ "$force" = 0 ] && [ -s "$folder/model.engine" ] && [ "$(cat "$folder/stamp.txt" 2>/dev/null)" = "$(stamp "$1")" ]; then
        say "$1: the engine is there already, of the same model and TensorRT (--force builds again)"
        return
    fi
    rm -f "$folder/model.engine" "$folder/stamp.txt" "$folder/layers.json"
    for space in $WORKSPACES; do
        say "$1: building the engine (workspace: $([ "$space" = 0 ] && echo "as trtexec chooses" || echo "$space MB"))"
        build_with "$1" "$space"
        status=$?
        if [ "$status" = 0 ] && [ -s "$part" ]; then
            mv "$part" "$folder/model.engine" || die "cannot write into $folder"
            stamp "$1" >"$folder/stamp.txt"
            part=""
            say "$1: built, $(wc -c <"$folder/model.engine" | tr -d ' ') bytes"
            return
        fi
        rm -f "$part"
        if [ "$status" = 0 ]; then
            die "trtexec wrote no engine of $1; its output is in $folder/build.log"
        fi
        if ! ran_out_of_memory "$status" "$folder/build.log"; then
            die "trtexec could not build $1 (status $status$(first_error "$folder/build.log")); its output is in $folder/build.log"
        fi
        say "$1: out of memory with this workspace"
    done
    die "the build of $1 runs out of memory with every workspace: close other programs, add swap (see README.md) and run again"
}

# One line per model and round for whoever reads along: what is measured is then known, whatever happens later.
print_times() { # label round
    sed -n 's/.*"startComputeMs" : \([^ ,]*\).*"computeMs" : \([^ ,]*\).*/\1 \2/p' "results/$1/times.$2.json" |
        awk -v warm="$WARM_UP" -v what="times $1 $2" '$1 >= warm { what = what " " $2 } END { print what }'
}

time_model() { # label round
    label=$1
    round=$2
    folder=results/$label
    inputs=$(cat "$label/inputs.txt")
    [ "$code" -ge 100000 ] || inputs=$(cat "$label/inputs32.txt")
    part=$folder/times.$round.json.part
    set -- "--loadEngine=$folder/model.engine" "--warmUp=$WARM_UP" \
        "--duration=$SECONDS_EACH" "--iterations=$ITERATIONS" "--exportTimes=$part"
    if [ -n "$inputs" ]; then set -- "$@" "--loadInputs=$inputs"; fi
    if [ "$TIMES_ONLY" = 0 ] && [ "$round" = 1 ]; then set -- "$@" "--exportOutput=$folder/output.json"; fi
    if [ "$dialect" = 11 ]; then
        set -- "$@" --includeDataTransfers --noCudaGraph # what the versions before it do unless told
    else
        set -- "$@" --useSpinWait
    fi
    run "$folder/run.$round.log" "$trtexec" "$@"
    status=$?
    if [ "$status" != 0 ] || [ ! -s "$part" ]; then
        die "trtexec could not run $label (status $status$(first_error "$folder/run.$round.log")); its output is in $folder/run.$round.log"
    fi
    mv "$part" "$folder/times.$round.json" || die "cannot write into $folder"
    part=""
    [ "$TIMES_ONLY" = 0 ] || print_times "$label" "$round"
}

# In turn, and every other round backwards: what gets warm or busy meanwhile slows all models alike.
time_all() {
    backwards=""
    for label in $MODELS; do
        [ "$keep_times" = 1 ] || rm -f results/"$label"/times.*.json results/"$label"/run.*.log results/"$label"/output.json
        backwards="$label $backwards"
    done
    turn=1
    while [ "$turn" -le "$ROUNDS" ]; do
        say "timing, round $turn of $ROUNDS"
        order=$MODELS
        [ $((turn % 2)) = 1 ] || order=$backwards
        for one in $order; do
            [ "$keep_times" = 1 ] && [ -s "results/$one/times.$turn.json" ] && continue
            time_model "$one" "$turn"
        done
        turn=$((turn + 1))
    done
}

parse_options "$@"
trap clean_up EXIT
trap interrupted INT TERM HUP
lock
python=$(command -v python3 || true)
if [ -n "$python" ]; then
    "$python" check.py --files || exit 1
fi
find_trtexec
find_version
choose_dialect
check_memory
check_disk
describe_device
rm -f results/results.json
for one in $MODELS; do
    build "$one"
done
if [ "$build_only" = 1 ]; then
    say "built; not timed"
    exit 0
fi
time_all
if [ "$TIMES_ONLY" = 1 ]; then
    say "timed"
elif [ -n "$python" ]; then
    "$python" check.py
else
    say "no python3 here, so nothing is compared: copy this folder back and run python3 check.py in it"
fi
