"""What a bundle takes along to the device; check.py sums up here, too, what came back."""
