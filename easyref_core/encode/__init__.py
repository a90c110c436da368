"""From a group of references and a prompt to reference tokens; inspection and heat maps."""
