"""From a group of references and a prompt to reference tokens: the encoder and its plan, the group
and its plan, passes; inspection and heat maps."""
