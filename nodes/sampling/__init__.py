"""What happens while a sampler runs: run, model call, layer.

    EasyRef Apply, Region, Set Conditioning
      |  Effect (weights.py, masks.py): reference tokens, and the weights with which they act
      v
    patch.py: ReferencePatch, one Apply node on a model; ComfyUI calls its wrappers
      |
      v  once a run: OUTER_SAMPLE, PREPARE_SAMPLING, then CALC_COND_BATCH once a step
    run.py, conditionings.py: which conditionings, which references
      |  CondRows: the rows of one conditioning: negative?, area, tokens that it carries
      v  once a model call: APPLY_MODEL
    batch_rows.py, model_call.py: which rows, which noise level, which weights
      |  CallRows: how the rows are divided; EffectOnRows: an effect, its rows and their scale at
      |  this noise level, K and V from host/key_value_cache.py
      v  once a layer: patches_replace["attn2"]
    layer.py: q, K and V, mask, add
         ReferenceShare -> easyref_core/adapter/attention.py: out = text + scale * attention

EasyRef Identity goes the same way beside it: identity.py (IdentityPatch, one node on a model) ->
identity_run.py (run and step) -> identity_pass.py (the reference pass) -> identity_layer.py
(patches_replace["attn1"]) -> easyref_core/adapter/identity.py.

Everything is immutable or belongs to one run or one model call, so that several runs and several
GPUs' threads never share state.
"""
