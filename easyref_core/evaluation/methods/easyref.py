"""EasyRef and the paper's two ways to combine its tokens: average and concatenate. `easyref-other`
gives a group the references of the next one: a control, which must not look like the group."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...adapter.checkpoint import load_checkpoint
from ...adapter.key_values import check_model_layers
from ...adapter.stages import Stages, Window, parse_stages
from ...encode.cache import EncodingCache
from ...encode.check_group import check_pooling
from ...encode.group import GroupPlan, Reference, chosen_size, plan_group
from ...encode.passes import encode_references
from ...encode.plan_encoder import plan_encoder
from ...errors import EasyRefError
from ...files import write_atomically, writing
from ...pictures.loading import named
from ...pictures.preprocessing import reduced
from ...qwen2vl.prompt import PromptTokenizer
from ...tokens.reference_tokens import ReferenceTokens, load_tokens, save_tokens, stack_tokens
from ...untrusted import number, read_json
from ..groups import GroupPicture
from ..identity import file_identity, folder_identity
from ..trials import Trial, Variant
from . import Generated
from .failures import concerns_all
from .other_group import OtherGroups
from .pipeline import GenerationPipeline
from .sampling import Prepared, TextStates, generate_batch, opened

if TYPE_CHECKING:
    from ...encode.encoder import EasyRefEncoder
    from ...sdxl_diffusers.identity_latents import IdentityLatents

_MLLM_FILES = ("*.json", "*.txt", "*.safetensors", "*.bin")


class EasyRefMethod:
    """References through the MLLM and an EasyRef adapter; see `Method`.

    Args:
        name: `easyref`, `easyref-other`, `average` or `concatenate`.
        mllm: Qwen2-VL directory.
        adapter: of variants that name none.
        others: that variants name.
        other_groups: for `easyref-other`.

    Raises:
        EasyRefError: an adapter or an MLLM that is missing, damaged or made for other models.
    """

    def __init__(
        self,
        name: str,
        base: GenerationPipeline,
        mllm: Path,
        adapter: Path | None,
        others: Sequence[Path] = (),
        other_groups: OtherGroups | None = None,
    ) -> None:
        self.name = name
        self._base = base
        self._mllm = mllm
        self._tokenizer = PromptTokenizer.from_directory(mllm)
        self._default = adapter
        self._other_groups = other_groups
        paths = dict.fromkeys([*([adapter] if adapter else []), *others])
        self._plans = {path: plan_encoder(load_checkpoint(path), mllm) for path in paths}
        for plan in self._plans.values():
            check_model_layers(plan.checkpoint, base.cross_attention, "The base model")
        self._attached: Path | None = None
        self._has_identity = False
        self._encoder: tuple[Path, EasyRefEncoder, EncodingCache] | None = None
        self._keys: dict[tuple[Any, ...], str] = {}

    def identity(self) -> dict[str, Any]:
        return {
            **self._base.identity,
            "adapters": [file_identity(path) for path in self._plans],
            "mllm": folder_identity(self._mllm, _MLLM_FILES),
        }

    def check(self, variant: Variant) -> None:
        """Raise EasyRefError where the adapter has no weights for a variant's aggregation."""
        check_pooling(self._plans[self._path(variant)], self._aggregation(variant), None)

    def generate(self, trials: Sequence[Trial], work: Path) -> list[Generated]:
        variant = trials[0].variant
        stages = parse_stages(variant.stages) or Stages(Window(), Window())
        if self._other_groups is not None:
            trials = [self._other_groups.swapped(trial) for trial in trials]
        path = self._path(variant)
        self._attach(path)

        def prepare(trial: Trial) -> Prepared:
            tokens, latents, seconds = None, None, 0.0
            if variant.weight:
                tokens, seconds = self._tokens(trial, path, work)
            if variant.identity:
                start = time.perf_counter()
                latents = self._latents(trial)
                seconds += time.perf_counter() - start
            kind = tokens.num_tokens if tokens else 0
            return Prepared((tokens, latents), kind, {"encode": seconds})

        def steer(groups: Sequence[Any], states: TextStates) -> TextStates:
            tokens, latents = zip(*groups, strict=True)
            stacked = stack_tokens(tokens) if variant.weight else None
            return self._steered(variant, stages, stacked, latents, states)

        return generate_batch(self._base, trials, prepare, steer)

    def _steered(
        self,
        variant: Variant,
        stages: Stages,
        tokens: ReferenceTokens | None,
        latents: Sequence[IdentityLatents],
        states: TextStates,
    ) -> TextStates:
        """States with reference tokens, and what the pipeline is told of stages and identity."""
        from ...sdxl_diffusers.adapter import append_tokens, set_tokens
        from .stages import stage_tokens

        pipe = self._base.pipe
        options = stage_tokens(pipe, stages.tokens, variant.weight, variant.steps)
        if variant.identity:
            from ...sdxl_diffusers.identity import attach_identity, identity_run

            attach_identity(pipe.unet)
            self._has_identity = True
            window = stages.identity
            run = identity_run(
                pipe, latents, variant.identity * window.weight, window.start, window.end
            )
            options["cross_attention_kwargs"] = {"identity": run}
        if tokens is None:  # the LoRA alone
            set_tokens(pipe.unet, None)
            return TextStates(states.text, states.negative, options)
        return TextStates(*append_tokens(pipe.unet, tokens, states.text, states.negative), options)

    def _latents(self, trial: Trial) -> IdentityLatents:
        """The trial's references for identity.

        Raises:
            EasyRefError: an unreadable reference.
        """
        from ...sdxl_diffusers.identity_latents import IdentityLatents, encode_identity

        pipe, size = self._base.pipe, self._base.settings.size
        # One by one: full-size photographs of a large group would fill the memory.
        encoded = (encode_identity(pipe, [p], size, size) for p in opened(trial.references))
        return IdentityLatents(tuple(latent for each in encoded for latent in each.latents))

    def _path(self, variant: Variant) -> Path:
        return Path(variant.adapter) if variant.adapter else self._default

    def _aggregation(self, variant: Variant) -> str:
        if self.name in ("average", "concatenate"):
            return self.name
        return variant.aggregation

    def close(self) -> None:
        self._encoder = None
        if self._attached is not None:
            from ...sdxl_diffusers.adapter import detach_adapter

            detach_adapter(self._base.pipe.unet)
            self._attached = None
        if self._has_identity:
            from ...sdxl_diffusers.identity import detach_identity

            detach_identity(self._base.pipe.unet)
            self._has_identity = False
        self._base.free_cache()

    def _attach(self, path: Path) -> None:
        from ...sdxl_diffusers.adapter import attach_adapter

        if self._attached != path:
            attach_adapter(self._base.pipe.unet, self._plans[path].checkpoint)
            self._attached = path

    def _tokens(self, trial: Trial, path: Path, work: Path) -> tuple[ReferenceTokens, float]:
        """A trial's tokens, and how long it took to encode them when it was done."""
        variant = trial.variant
        fields = (variant.image_size, variant.insert_before, variant.aggregation)
        what = (trial.references, trial.prompt, path, *fields)
        plan = None
        if what not in self._keys:
            plan = self._plan(trial, path)
            self._keys[what] = _key(plan, self._dtype)
        file = work / "tokens" / f"{self._keys[what]}.safetensors"
        found = _read(file)
        if found is None:
            start = time.perf_counter()
            tokens = self._encode(plan or self._plan(trial, path), path)
            found = tokens, time.perf_counter() - start
            with concerns_all("reference tokens"):
                _write(file, *found)
        return found

    def _plan(self, trial: Trial, path: Path) -> GroupPlan:
        """
        Raises:
            EasyRefError: an unreadable reference, or references that cannot be encoded.
        """
        variant, encoder = trial.variant, self._plans[path]
        size = chosen_size(variant.image_size, encoder)
        return plan_group(
            encoder,
            self._tokenizer,
            [_reference(picture, size) for picture in trial.references],
            trial.prompt,
            aggregation=self._aggregation(variant),
            image_size=size,
            insert_before=variant.insert_before or None,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """The MLLM overflows in float16; officially it is bfloat16 then."""
        dtype = self._base.dtype
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def _encode(self, plan: GroupPlan, path: Path) -> ReferenceTokens:
        encoder, cache = self._loaded(path)
        device = self._base.device
        try:
            return encode_references(encoder.to(device), plan, device=device, cache=cache)
        finally:
            if self._base.settings.offload:
                encoder.to("cpu")
                self._base.free_cache()

    def _loaded(self, path: Path) -> tuple[EasyRefEncoder, EncodingCache]:
        if self._encoder is None or self._encoder[0] != path:
            self._encoder = None  # not two at once
            with concerns_all("the MLLM"):
                encoder = self._plans[path].build(dtype=self._dtype, compute_dtype=self._dtype)
            # Without prefixes, so that no image depends on those before it.
            self._encoder = path, encoder, EncodingCache(prefixes=0)
        return self._encoder[1:]


def _reference(picture: GroupPicture, size: int) -> Reference:
    name = str(picture.source)
    opened = picture.source.open()
    with named(name):  # full-size photographs of a large group would fill the memory
        return Reference(reduced(opened, size), name=name)


def _key(plan: GroupPlan, dtype: torch.dtype) -> str:
    """Of all that a group's tokens depend on: files, token ids, pixels and settings."""
    digest = hashlib.sha256()

    def add(*content: Any) -> None:
        digest.update(json.dumps(content).encode())

    encoder = plan.encoder
    files = {(file.stamp.size, file.stamp.digest) for file, _ in encoder.sources.values()}
    add(encoder.identity, sorted(files), str(dtype), plan.aggregation, plan.insert_before)
    for mllm_pass in (*plan.passes, plan.unconditional):
        add(mllm_pass.chat.ids.tolist(), [image.key.hex() for image in mllm_pass.images])
    return digest.hexdigest()[:32]


def _read(file: Path) -> tuple[ReferenceTokens, float] | None:
    """Tokens that were kept, and the seconds that they took; None where there are none, or
    damaged ones."""
    try:
        tokens = load_tokens(file)
        seconds = number(read_json(_seconds_file(file)), "seconds", low=0)
    except EasyRefError:
        return None
    return tokens, seconds


def _write(file: Path, tokens: ReferenceTokens, seconds: float) -> None:
    path = _seconds_file(file)
    with writing(path):
        write_atomically(path, lambda part: part.write_text(json.dumps(seconds)))
        if file.is_file():  # damaged, or another process was quicker
            file.unlink(missing_ok=True)
    save_tokens(tokens, file, overwrite=True)


def _seconds_file(file: Path) -> Path:
    return file.with_suffix(".json")
