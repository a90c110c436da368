"""What each trial costs, as ratios of one run, with bars.

    python -m benchmarks.speed [--out FOLDER] [--small] [--device cuda] [--comfyui FOLDER]
        [--ipadapter FOLDER] [--official FOLDER]

- encoding: what a change of a group costs, as a share of encoding it for the first time.
- by references: the seconds of 1 to 112 references, and how far they are from a straight line.
- official: `--official` has the official procedure encode the same group, on a CPU.
- inspecting: seconds and memory of `easyref inspect` for files of released size.

On a CPU, where there is a ComfyUI:

- sampling: what EasyRef Apply adds to a step; `--ipadapter` has IP-Adapter Plus measured as well.
- sampling_memory: what a step needs more memory, at real size.
- growth: memory after sixty prompts.

On a CPU one thread computes, and its own time is counted, so a busy computer changes little. On a
GPU the clock on the wall counts, with nothing else on the card.
"""
