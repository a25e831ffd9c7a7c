"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const results = document.getElementById("results"), detail = document.getElementById("detail");
  const search = document.getElementById("search");
  const LIMIT = 200;

  // names come from a stranger's file: they are only ever set as text
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const button = (text, soft, action) => {
    const element = make("button", text, "item");
    element.type = "button";
    if (soft) element.append(" ", make("span", soft, "soft"));
    element.addEventListener("click", action);
    return element;
  };

  const places = data.names.map(() => []);  // by tensor: [component, place]
  data.components.forEach((component, c) => component.places.forEach((place, p) => places[place[0]].push([c, p])));
  const byOp = data.ops.map(() => new Set());
  data.components.forEach((component, c) => component.ties.forEach((tie) => byOp[tie[2]].add(c)));

  const title = (c) => {
    const one = data.components[c];
    return one.id || (one.reasons.length ? "stays: " + one.reasons[0][0] : "in no group");
  };
  const extent = (one) => (one.heads > 1 ? one.heads + " × " : "") + one.size;
  const where = (c, p) => {
    const [tensor, axis, position] = data.components[c].places[p];
    const shape = data.shapes[tensor];
    const part = data.components[c].size !== shape[axis] ? ", part " + (position + 1) : "";
    return [data.names[tensor], "axis " + axis + part + (shape.length ? " of " + shape.join(" × ") : "")];
  };

  const show = (parts) => { detail.replaceChildren(...parts); };

  const tensor = (t) => {
    const parts = [make("h2", data.names[t]), make("p", (data.weights[t] ? "weight, " : "activation, ") + (data.shapes[t].join(" × ") || "scalar"), "soft")];
    places[t].slice().sort((a, b) => data.components[a[0]].places[a[1]][1] - data.components[b[0]].places[b[1]][1]).forEach(([c, p]) => {
      parts.push(button(where(c, p)[1] + ": " + title(c), extent(data.components[c]) + ", with " + (data.components[c].places.length - 1) + " others", () => component(c, p)));
    });
    show(parts);
  };

  // the shortest chain of ties from one place to another, as Dependencies.why finds it
  const chain = (c, from, to) => {
    const one = data.components[c], near = one.places.map(() => []);
    one.ties.forEach(([a, b, op]) => { near[a].push([b, op]); near[b].push([a, op]); });
    const before = new Map([[from, null]]), queue = [from];
    for (let i = 0; i < queue.length && !before.has(to); i++)
      for (const [next, op] of near[queue[i]]) if (!before.has(next)) { before.set(next, [queue[i], op]); queue.push(next); }
    if (!before.has(to)) return null;
    const found = [];
    for (let at = to; at !== null;) { const step = before.get(at); found.unshift([at, step && step[1]]); at = step && step[0]; }
    return found;
  };

  const component = (c, p, filter = "") => {
    const one = data.components[c];
    const parts = [make("h2", title(c)), make("p", (one.kind ? one.kind + ", " : "") + extent(one) + " indices in " + one.places.length + " places", "soft")];
    one.reasons.forEach(([reason, node]) => parts.push(make("p", "must stay: " + reason + (node ? " (at " + node + ")" : ""), "warn")));
    const why = make("div");
    const box = make("input");
    box.type = "search"; box.placeholder = "filter the members"; box.setAttribute("aria-label", "filter the members"); box.value = filter;
    const list = make("div");
    const explain = (q) => {
      const way = chain(c, p, q), steps = make("ol", undefined, "chain");
      why.replaceChildren(make("h3", "Why they are tied"));
      if (!way) { why.append(make("p", "no chain of ties: the factor is the same by its size alone")); return; }
      way.forEach(([place, op], i) => {
        if (i) steps.append(make("li", data.ops[op], "op"));
        const [name, axis] = where(c, place), li = make("li", name + " ");
        li.append(make("span", axis, "soft"));
        steps.append(li);
      });
      why.append(steps);
    };
    const fill = () => {
      const wanted = box.value.toLowerCase();
      const hits = one.places.map((_, q) => q).filter((q) => where(c, q)[0].toLowerCase().includes(wanted));
      hits.sort((a, b) => data.weights[one.places[b][0]] - data.weights[one.places[a][0]] || a - b);
      list.replaceChildren(...hits.slice(0, LIMIT).map((q) => button(where(c, q)[0], where(c, q)[1] + (data.weights[one.places[q][0]] ? ", weight" : ""), () => explain(q))));
      if (hits.length > LIMIT) list.append(make("p", (hits.length - LIMIT) + " more; filter to see them", "soft"));
    };
    box.addEventListener("input", fill);
    fill();
    const start = make("p", "Seen from "), [name, axis] = where(c, p);
    start.append(make("code", name), " " + axis + ". Pick a member to see the operators that tie it to this place.");
    parts.push(start, why, make("h3", "Members"), box, list);
    show(parts);
  };

  const list = (wanted, kind) => {
    const found = [];
    data.components.forEach((one, c) => {
      if (one.id && (kind ? one.kind === kind : one.id.toLowerCase().includes(wanted)))
        found.push(button(one.id, extent(one) + ", " + one.places.length + " places" + (one.reasons.length ? ", must stay" : ""), () => component(c, 0)));
    });
    if (!kind && wanted) {
      data.names.forEach((name, t) => { if (name.toLowerCase().includes(wanted)) found.push(button(name, data.shapes[t].join(" × "), () => tensor(t))); });
      data.ops.forEach((name, o) => {
        if (!name.toLowerCase().includes(wanted)) return;
        found.push(button(name, "operator, ties " + byOp[o].size + " factors", () => {
          const parts = [make("h2", name), make("p", "ties places of:", "soft")];
          byOp[o].forEach((c) => {
            const tie = data.components[c].ties.find((one) => one[2] === o);
            parts.push(button(title(c), where(c, tie[0])[0] + " – " + where(c, tie[1])[0], () => component(c, tie[0])));
          });
          show(parts);
        }));
      });
    }
    const more = found.length - LIMIT;
    results.replaceChildren(...found.slice(0, LIMIT));
    if (more > 0) results.append(make("p", more + " more; type more of the name", "soft"));
    if (!found.length) results.append(make("p", "nothing has this in its name", "soft"));
  };

  search.addEventListener("input", () => list(search.value.trim().toLowerCase()));
  document.querySelectorAll("[data-kind]").forEach((one) => one.addEventListener("click", () => list("", one.dataset.kind)));
  list("");
})();
