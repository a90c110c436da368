"""EasyRef's core in plain torch: from a group of reference images to steered cross-attention.

Data flows one way: `preprocessing` and `prompt` -> `mllm` and `encoder` -> `aggregation` ->
`tokens` -> `adapter` -> a host (`diffusers_adapter` here, ComfyUI in the node pack).
"""
