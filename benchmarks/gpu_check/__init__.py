"""Checks that need a GPU, in minutes and without downloads: `make gpu-check`.

    python -m benchmarks.gpu_check [--comfyui FOLDER] [--out FILE] [--only NAME ...] [--small]

Builds adapter and SDXL of released size with random weights in a temporary folder, runs the nodes
inside a real ComfyUI, writes every measurement with its limit to a JSON file and prints a table;
the exit status is 1 if a limit is exceeded or a check fails.

- `__main__`: the command; starts one worker process per set of ComfyUI options
- `plan`: the list of checks, and ComfyUI's options for each
- `report`: rows, verdicts, the JSON and the table
- `worker`: one process with ComfyUI inside, which runs checks and records their rows
- `bench`: shared by all checks: models, nodes, sampling, time and memory
- `parity`, `sampling`, `encoding`, `memory`, `dynamic`, `compiled`, `quantised`: the checks
"""
