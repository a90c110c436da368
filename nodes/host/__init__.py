"""What ties EasyRef to ComfyUI beside sampling: folders and files, memory, attention kernels, keys
and values, LoRA, compiled models, the demo models."""
