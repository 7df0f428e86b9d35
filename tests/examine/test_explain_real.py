"""`explain` against what transformers, PEFT, torch and safetensors print today, and sound logs."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from converter.examine.explanations.log import read

TINY = LlamaConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=16,
    num_labels=1,
    pad_token_id=0,
)
Tensors = dict[str, torch.Tensor]


def named(text: str | bytes) -> list[str]:
    raw = text.encode() if isinstance(text, str) else text
    return [seen.message.code for seen, is_new in read([raw]) if is_new]


def severities(text: str) -> set[str]:
    return {seen.message.severity for seen, _ in read([text.encode()])}


def printed(load: Callable[[], object]) -> str:
    """What transformers logs while it loads, and the error that it ends with."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = transformers_logging.get_logger("transformers")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        load()
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        stream.write(f"{type(error).__name__}: {error}\n")
    finally:
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(level)
    return stream.getvalue()


def model(folder: Path, edit: Callable[[Tensors], object]) -> Path:
    LlamaForSequenceClassification(TINY).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **settings: object) -> Callable[[], object]:
    return lambda: LlamaForSequenceClassification.from_pretrained(folder, **settings)


def test_the_load_report_of_empty_tensors_says_that_the_file_is_empty(tmp_path: Path) -> None:
    folder = model(tmp_path, lambda t: t.update({n: torch.empty(0) for n in t if "mlp" in n}))
    found = named(printed(load(folder)))
    assert "mismatch-report-empty-file" in found
    assert "mismatched-sizes-ignored" in found
    assert "mismatch-report" not in found


def test_the_load_report_of_a_head_with_another_number_of_labels_says_labels(tmp_path: Path) -> None:
    found = named(printed(load(model(tmp_path, lambda t: None), num_labels=2)))
    assert found[:2] == ["labels-passed", "mismatch-report-labels"]


def test_the_load_report_of_names_with_a_prefix_says_the_prefix(tmp_path: Path) -> None:
    folder = model(tmp_path, lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)])
    assert {"prefix-report", "weights-missing-report", "head-missing-report"} <= set(named(printed(load(folder))))


def test_the_load_report_of_a_head_under_another_name_says_that_it_is_thrown_away(tmp_path: Path) -> None:
    folder = model(tmp_path, lambda t: t.update({"v_head.summary.weight": t.pop("score.weight")}))
    assert {"head-unused-report", "head-missing-report"} <= set(named(printed(load(folder))))


def test_the_load_report_folds_layers_and_the_name_is_shown_whole(tmp_path: Path) -> None:
    folder = model(tmp_path, lambda t: [t.pop(n) for n in list(t) if "up_proj" in n])
    seen = next(s for s, _ in read([printed(load(folder)).encode()]))
    assert seen.message.code == "weights-missing-report"
    assert seen.groups["name"] == "model.layers.{0, 1}.mlp.up_proj.weight"


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"])
def test_what_safetensors_says_today_of_a_file_that_is_none_is_known(tmp_path: Path, content: bytes) -> None:
    folder = model(tmp_path, lambda t: None)
    (folder / "model.safetensors").write_bytes(content)
    assert named(printed(load(folder))) == ["header-incomplete"]


def test_what_safetensors_says_today_of_a_truncated_file_is_known(tmp_path: Path) -> None:
    file = model(tmp_path, lambda t: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert named(printed(load(tmp_path))) == ["header-incomplete"]


def test_torchs_lists_of_missing_and_unexpected_keys_are_known() -> None:
    sound = LlamaForSequenceClassification(TINY)
    wrapped = {f"module.{n}": t for n, t in sound.state_dict().items()}
    found = named(printed(lambda: sound.load_state_dict(wrapped)))
    assert found == ["state-dict-errors", "state-dict-keys", "state-dict-prefix"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_and_an_adapter_with_empty_tensors_or_for_another_vocabulary(tmp_path: Path) -> None:
    base = LlamaForCausalLM(TINY)
    made = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    made.save_pretrained(tmp_path)
    other = LlamaForCausalLM(LlamaConfig(**{**TINY.to_dict(), "vocab_size": 18}))
    assert "vocabulary-mismatch" in named(printed(lambda: PeftModel.from_pretrained(other, tmp_path)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors |= {n: torch.empty(0) for n in tensors if "lora_B" in n}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = named(printed(lambda: PeftModel.from_pretrained(LlamaForCausalLM(TINY), tmp_path)))
    assert "size-mismatch-empty-file" in found


PREFIXES = [
    "",
    "[rank0]: ",
    "(ActorModelRayActor pid=123, ip=10.0.0.1) ",
    "[INFO|modeling_utils.py:4473] 2026-01-01 10:00:00,123 >> ",
    "\x1b[36m(WorkerDict pid=7)\x1b[0m \x1b[33m",
    "12%|#   | 3/40 [00:01<00:03]\r",
]


ENDS = ("\n", "\r\n", "\x1b[0m\n", "")
PLACES = [(prefix, end) for prefix in PREFIXES for end in ENDS]


@pytest.mark.parametrize(
    ("prefix", "end"), [p if at % 5 == 0 else pytest.param(*p, marks=pytest.mark.slow) for at, p in enumerate(PLACES)]
)
def test_a_message_is_known_behind_every_prefix_and_before_every_line_end(prefix: str, end: str) -> None:
    for text, name in CATALOGUE:
        if not text.startswith(("remove", "--", "ignore", "model.load")):
            assert named(prefix + text + end) == [name]


SIZES = "copying a param with shape torch.Size"
CATALOGUE = [
    (
        f"size mismatch for a.weight: {SIZES}([0]) from checkpoint, shape in current model is torch.Size([5, 3])",
        "size-mismatch-empty-file",
    ),
    (
        f"size mismatch for a.weight: {SIZES}([4,4]) from checkpoint, the shape in current model is torch.Size([0])",
        "size-mismatch-empty-model",
    ),
    (f"size mismatch for base_model.model...lora_B.default.weight: {SIZES}([0])", "size-mismatch-empty-file"),
    ("Parent directory ../pytorch_model.bin does not exist", "zero-to-fp32-folder"),
    ("fsdp_config.json does not exist", "verl-config-missing"),
    ("The size of tensor a (18959) must match the size of tensor b (19471)", "tensor-sizes-differ"),
    ("size of tensor a (18959) must match b (19471)", "tensor-sizes-differ"),
    ("_fsdp_wrapped_module._flat_param", "flat-parameters"),
    ("Some weights of CriticModel were not initialized ...: ['score.weight']", "head-newly-initialised"),
    ("no v_head weight is found", "no-value-head-found"),
    ("Failed to load value_head.bin", "no-value-head-found"),
    ("size mismatch for score.lora_B: [1, 8] ... current model [2, 8]", "labels-mismatch"),
    ("weights not used: ['lm_head.weight'/'embed_out.weight']", "weights-not-used"),
    ("Cannot find model checkpoint at .../pytorch_model.bin", "dschat-checkpoint"),
    (
        "ValueError: Model architectures ['LlamaForSequenceClassification'] are not supported",
        "architecture-unsupported",
    ),
    ("The model does not support Score API", "score-unsupported"),
    ("Found missing adapter keys while loading the checkpoint: [...]", "adapter-keys-missing"),
    ("KeyError: 'layers.11.mlp.down_proj.weight'", "unmerged-keys"),
    ("Can not map tensor 'model.layers.0.mlp.down_proj.SCB'", "tensor-not-mapped"),
    ("blk.0.ffn_down.weight torch.uint8", "tensor-not-mapped"),
    ("Merge lora module to 4-bit linear may get different generations", "merge-four-bit"),
    ("base_model.model.score.weight is unsupported LoRA weight", "lora-weight-unsupported"),
    ("size mismatch ... [32001,4096] vs [32000,4096]", "size-mismatch-cut"),
    ("Can't find 'adapter_config.json'", "no-adapter-config"),
    ("KeyError: 'base_model_name_or_path'", "adapter-config-beside-model"),
    ("Cannot find model module. 'FSDPQwen2ForCausalLM' is not a registered model", "architecture-unsupported"),
    ("KeyError: 'language_model.embed_tokens.weight'", "vision-names"),
    ("Can not map tensor 'lm_head.weight'", "embedding-key-error"),
    ("AttributeError: 'NoneType' object has no attribute 'get'", "format-missing"),
    ("Due to a serious vulnerability issue in torch.load ... upgrade torch to at least v2.6", "pickle-vulnerability"),
    ("assert loaded_weight.shape[output_dim] == self.org_vocab_size", "vocabulary-padded"),
    ("token_embd.weight has wrong shape; expected 5120, 65110, got 65112", "vocabulary-padded"),
    ("Tokenizer class TokenizersBackend does not exist", "tokenizer-class"),
    ("'list' object has no attribute 'keys'", "tokenizer-class"),
    ("./x does not appear to have a file named modeling_*.py", "remote-code-missing"),
    ("ignore_mismatched_sizes=True", "mismatched-sizes-ignored"),
    ("remove --gradient_checkpointing", "gradient-checkpointing"),
    ("--gradient_checkpointing", "gradient-checkpointing"),
    ("model.load_state_dict(state, strict=False)", "strict-false"),
]


@pytest.mark.parametrize(("text", "name"), CATALOGUE)
def test_every_text_of_the_catalogue_is_known(text: str, name: str) -> None:
    assert named(text) == [name]


SOUND = """\
[INFO|modeling_utils.py:4480] >> All the weights of LlamaForCausalLM were initialized from the model checkpoint at x.
[WARNING|logging.py:329] >> `use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.
{'loss': 0.693, 'grad_norm': 1.2, 'learning_rate': 1e-05, 'epoch': 0.01, 'rewards/margins': 0.1}
Loading checkpoint shards:   0%|          | 0/4 [00:00<?]\rLoading checkpoint shards:  25%|##   | 1/4 [00:01<00:03]
TrainingArguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={'use_reentrant': False}, fsdp=[])
ModelArguments(model_name_or_path='x', ignore_mismatched_sizes=False, trust_remote_code=False, use_cache=True)
Namespace(zero_stage=3, gradient_checkpointing=True, strict=False, value_head_prefix='score', critic_pretrain=None)
deepspeed --module openrlhf.cli.train_rm --save_path ./ckpt --gradient_checkpointing --value_head_prefix score
(ActorModelRayActor pid=1) [INFO] [partition_parameters.py:348] finished initializing model - num_elems = 7.62B
(TaskRunner pid=999) Checkpoint tracker file does not exist: /x/latest_checkpointed_iteration.txt
(TaskRunner pid=999) step:1 - critic/score/mean:0.5 - perf/max_memory_allocated_gb:40.0 - global_seqlen/min:1000
(WorkerDict pid=5) [Rank 0] Saved model to /x/global_step_10/actor/model_world_size_8_rank_0.pt
[INFO] [engine.py:3500] zero checkpoint saved ckpt/global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt
Provided path (x) does not contain value head weights: x does not appear to have a file named value_head.bin.
There were missing keys in the checkpoint model loaded: ['lm_head.weight'].
Removed shared tensor {'lm_head.weight'} while saving. This should be OK
lm_head.weight | UNEXPECTED |
| metric | MISSING | value
torch.Size([0])
The process was Killed in the story, and memory was out of the question. A size is a size.
"""


def test_a_sound_training_log_has_no_error() -> None:
    assert "error" not in severities(SOUND)
    assert named(SOUND)[0] == "gradient-checkpointing"


def test_line_numbers_are_those_of_an_editor_whatever_the_progress_bars_and_the_blocks() -> None:
    log = b"one\r\n" + b"\r10%\r20%\r30%" * 50 + b"\r\nunknown zero stage 1\r\nfour\n"
    for size in (1, 2, 7, len(log)):
        blocks = [log[i : i + size] for i in range(0, len(log), size)]
        assert [(s.message.code, s.line) for s, _ in read(blocks)] == [("zero-stage-unknown", 3)]


def test_a_message_deep_inside_a_line_of_megabytes_is_found() -> None:
    blocks = [b"\xff\x00x y" * 40_000] * 12 + [b" unknown zero stage 1 "] + [b"z" * 200_000] * 5
    assert {s.message.code for s, _ in read(blocks)} == {"zero-stage-unknown"}


def test_a_log_in_utf_16_as_powershell_writes_it_is_read() -> None:
    raw = "one\r\nunknown zero stage 1\r\n".encode("utf-16")
    assert [s.line for s, _ in read([raw[:9], raw[9:]])] == [2]


@pytest.mark.signals
def test_a_line_is_answered_at_once_through_a_pipe_and_an_interrupt_exits_130() -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    ours = [sys.executable, "-m", "converter", "explain", "-"]
    with subprocess.Popen(ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write(b"step\nunknown zero stage 1\n")
        run.stdin.flush()
        assert run.stdout.readline() == b"ERROR zero-stage-unknown (line 2)\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130


def test_transformers_4s_list_of_shapes_is_told_apart_too() -> None:
    first = "Some weights were newly initialized because the shapes did not match:\n- score.weight: found shape "
    empty = first + "torch.Size([0]) in the checkpoint and torch.Size([1, 8]) in the model instantiated"
    assert named(empty) == ["mismatched-sizes-ignored", "shapes-reported-empty-file"]
    other = first + "torch.Size([2, 8]) in the checkpoint and torch.Size([1, 8]) in the model instantiated"
    assert named(other) == ["mismatched-sizes-ignored", "shapes-reported"]
