"""A training script against the folders that it names: the mistakes that end in a random head or a late crash."""

from __future__ import annotations

import os
from collections.abc import Iterable

from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG
from converter.examine.diagnoses.case import Case, Finding, diagnosis
from converter.examine.diagnoses.config import architecture
from converter.examine.diagnoses.heads import dialect_of, heads_here
from converter.sources.survey import file_names
from converter.text import fold, show


@diagnosis("launch-unknown")
def launch_unknown(case: Case, context: Context) -> Iterable[Finding]:
    """The script that --launch names starts no trainer that is known here (OpenRLHF, verl, TRL, LLaMA-Factory,
    DeepSpeed-Chat), so nothing in it was checked. Scripts are read, never run: what a shell computes is not seen.
    """
    if case.launch is not None and case.launch.trainer is None:
        text = f"{show(case.launch.path)} starts no trainer that is known here: nothing in it was checked"
        yield Finding(code="launch-unknown", severity="cosmetic", text=text)


@diagnosis("launch-path-missing")
def launch_path_missing(case: Case, context: Context) -> Iterable[Finding]:
    """The script names a folder that is not there. Trainers pass it on to the Hub's client, whose error speaks of
    repository names (HFValidationError), or stop minutes later.
    """
    if case.launch is None:
        return
    for option, role, value in case.launch.models():
        is_made = os.path.normpath(value) in case.launch.made
        if _is_local(value) and case.launch.find(value) is None and not is_made:
            text = f"{option} ({role}) is {show(value)}, and there is no such folder"
            yield Finding(code="launch-path-missing", severity="error", text=text, evidence=(show(value),))


def _is_local(value: str) -> bool:
    """True for what can't be a repository of the Hub: `org/name` can."""
    return value.startswith((".", "/", "~")) or value.count("/") > 1


@diagnosis("launch-other-folder")
def launch_other_folder(case: Case, context: Context) -> Iterable[Finding]:
    """The script uses other folders than the one that is examined: what is said here is not of what it will load."""
    if case.launch is None or case.launch.trainer is None or case.launch.roles_of(case.root):
        return
    named = [f"{option} {show(value)}" for option, _, value in case.launch.models()]
    text = f"{show(case.launch.path)} does not use this folder" + (f"; it names {fold(named)}" if named else "")
    yield Finding(code="launch-other-folder", severity="cosmetic", text=text, evidence=tuple(named[:3]))


@diagnosis("launch-same-path")
def launch_same_path(case: Case, context: Context) -> Iterable[Finding]:
    """The script gives OpenRLHF one folder as actor and as critic. OpenRLHF then takes it that the critic begins anew
    and initialises its value head at RANDOM, even if the folder has a trained one. A copy or a link under another path
    is enough.
    """
    if case.launch is None or case.launch.trainer != "openrlhf":
        return
    named = {role: (option, value) for option, role, value in case.launch.models()}
    if "actor" in named and "critic" in named:
        paths = [os.path.normpath(named[r][1]) for r in ("actor", "critic")]
        if paths[0] == paths[1]:
            both = f"{named['actor'][0]} and {named['critic'][0]} are both {show(paths[0])}"
            text = f"{both}: OpenRLHF makes the critic's head RANDOM"
            advice = "give the critic a folder of its own"
            yield Finding(code="launch-same-path", severity="error", text=text, evidence=(show(paths[0]),), next=advice)


@diagnosis("launch-head-name", "model")
def launch_head_name(case: Case, context: Context) -> Iterable[Finding]:
    """The script's value_head_prefix (or the trainer's default) is not the name of the head in the folder, and
    config.json does not name it either: the head is not found, and a RANDOM one is made. config.json beats the option.
    """
    if case.launch is None or case.launch.trainer != "openrlhf" or case.config.get("value_head_prefix"):
        return
    prefix = case.launch.ending("value_head_prefix")
    stems = {n.removesuffix(".weight") for n in heads_here(case) if n.endswith(".weight") and ":" not in n}
    is_used = bool({"reward", "critic"} & set(case.launch.roles_of(case.root)))
    if prefix and stems and prefix not in stems and is_used:
        text = f"the script says value_head_prefix {show(prefix)}; the head in the folder is {fold(sorted(stems))}"
        advice = f"--value_head_prefix {show(min(stems))}"
        yield Finding(code="launch-head-name", severity="error", text=text, next=advice)


@diagnosis("launch-lora", "adapter")
def launch_lora(case: Case, context: Context) -> Iterable[Finding]:
    """The script's LoRA rank or alpha are not those of the adapter that it goes on with: the factors do not fit, or
    count more or less than in training.
    """
    if case.launch is None or not case.launch.roles_of(case.root):
        return
    for word, key, names in (("rank", "r", ("lora_rank", "lora_r", "lora.rank")),
                             ("alpha", "lora_alpha", ("lora_alpha", "lora.alpha"))):  # fmt: skip
        said, own = case.launch.ending(*names), case.adapter_config.get(key)
        if said is not None and isinstance(own, int | float) and said.isdigit() and int(said) not in (0, own):
            text = f"the script's LoRA {word} is {said}, and the adapter's is {own}"
            yield Finding(code="launch-lora", severity="changes-numbers", text=text, evidence=(ADAPTER_CONFIG,))


@diagnosis("launch-reward-type")
def launch_reward_type(case: Case, context: Context) -> Iterable[Finding]:
    """LLaMA-Factory's `reward_model_type` says `lora` (the default) or `full`, and the reward model's folder is of the
    other kind: with `lora` a full model fails an assertion, with `full` an adapter is loaded without its base.
    """
    if case.launch is None or case.launch.trainer != "llamafactory" or case.launch.options.get("stage") != "ppo":
        return
    value = case.launch.options.get("reward_model")
    place = None if value is None else case.launch.find(value)
    if place is None or not place.is_dir():
        return
    said = case.launch.options.get("reward_model_type", "lora")
    kind = "lora" if ADAPTER_CONFIG in file_names(place) else "full"
    if said in ("lora", "full") and said != kind:
        text = f"reward_model_type is {said}, and {show(value)} is {'an adapter' if kind == 'lora' else 'a full model'}"
        yield Finding(
            code="launch-reward-type",
            severity="error",
            text=text,
            evidence=(show(value),),
            next=f"reward_model_type: {kind}",
        )


@diagnosis("launch-role", "model")
def launch_role(case: Case, context: Context) -> Iterable[Finding]:
    """The script uses the folder as a reward model or critic, and it is a language model without a head; or as the
    actor, and it is a reward model without an output embedding.
    """
    if case.launch is None:
        return
    roles = set(case.launch.roles_of(case.root))
    has_head = bool(heads_here(case)) or dialect_of(case) is not None
    if roles == {"reward"} and not has_head and "CausalLM" in architecture(case):
        text = f"the script uses it as a reward model, and it is {show(architecture(case))} without a head"
        yield Finding(code="launch-role", severity="error", text=text)
    is_scorer = architecture(case).endswith(("Classification", "RewardModel", "CriticModel"))
    if roles == {"actor"} and has_head and is_scorer:
        text = f"the script uses it as the actor, and it is {show(architecture(case))}, which generates no text"
        yield Finding(code="launch-role", severity="error", text=text)
