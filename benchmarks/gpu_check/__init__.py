"""What only a GPU can show, checked in minutes and without downloads: `make gpu-check`.

    python -m benchmarks.gpu_check [--comfyui FOLDER] [--out FILE] [--only NAME ...] [--small]

Builds adapter and SDXL of released size with random weights in a temporary folder, runs the nodes
inside a real ComfyUI, writes every measurement with its bar into one JSON and prints one table;
the exit status is 1 where a bar is missed or a check fails.

- `__main__`: the command; starts one worker process for each way in which ComfyUI is started
- `plan`: which checks there are, and how ComfyUI is started for each
- `report`: rows, verdicts, the JSON and the table
- `worker`: one process with ComfyUI inside, which runs checks and notes their rows
- `bench`: what every check works with: models, nodes, sampling, time and memory
- `parity`, `sampling`, `encoding`, `memory`, `dynamic`, `compiled`, `quantised`: the checks
"""
