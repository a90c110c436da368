"""What each trial costs, as ratios of one run, with bars.

    python -m benchmarks.speed [--out FOLDER] [--small] [--device cuda] [--comfyui FOLDER]

- encoding: what a change of a group costs, as a share of encoding it for the first time.
- step: what EasyRef Apply adds to a sampling step (on a CPU, where there is a ComfyUI).
- references: the seconds of 1 to 16 references, on a GPU to 112.

On a CPU one thread computes, and its own time is counted, so a busy computer changes little. On a
GPU the clock on the wall counts, with nothing else on the card.
"""
