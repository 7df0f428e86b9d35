"""Heads, ties and vocabularies: reward models over causal bases, one side of a tie adapted, tokens added.

PEFT's own merge of a LoRA on one side of a tie moves both sides, so there the oracle is its unmerged forward pass, and
for the bits the merge of the same adapter over the same base stored untied.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import oracle
from oracle.adapters import adapter_tensors
from oracle.bases import edit_config, save_tokenizer, untied_copy, without_prefix
from oracle.command import merged, run
from oracle.expected import inputs_for
from selected import each_value, one_in

CLOSE = 4e-6
CLASSIFIER = "AutoModelForSequenceClassification"
CLASSES = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "opt": "OPTForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
}


@pytest.mark.parametrize(("family", "tied"), each_value(CLASSES.keys(), {"untied": False, "tied": True}))
def test_reward_adapter_over_a_causal_base_becomes_a_reward_model(family: str, tied: bool, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family, tied=tied, pad_token_id=0, dtype="float16", sharded=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    expected = oracle.peft_merge(base, adapter, task="SEQ_CLS")
    assert "score.weight" in expected
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
    _assert_index_is_whole(tmp_path / "out")

    config = oracle.read_config(tmp_path / "out")
    assert config["architectures"] == [CLASSES[family]]
    assert len(config["id2label"]) == 1
    assert config["pad_token_id"] == 0

    model = oracle.load_output(tmp_path / "out", CLASSIFIER)
    assert model.config.num_labels == 1
    inputs = inputs_for(base)
    forward = oracle.peft_logits(base, adapter, task="SEQ_CLS", inputs=inputs)
    assert forward.shape == (2, 1)
    assert oracle.relative_difference(oracle.logits(model, inputs), forward) < 1e-2
    # A shorter, padded answer is scored at its own last token.
    padded = {"input_ids": inputs["input_ids"].clone()}
    padded["input_ids"][1, 5:] = 0
    padded["attention_mask"] = (padded["input_ids"] != 0).long()
    forward = oracle.peft_logits(base, adapter, task="SEQ_CLS", inputs=padded)
    assert oracle.relative_difference(oracle.logits(model, padded), forward) < 1e-2


def _assert_index_is_whole(folder: Path) -> None:
    """Shards are numbered from one without a gap, and the index names each tensor where it lies."""
    files = sorted(folder.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    index = oracle.read_config(folder, "model.safetensors.index.json")
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in oracle.read_tensors(folder).values()
    )


def test_reward_head_in_float32_over_a_bfloat16_base_keeps_its_values(tmp_path: Path) -> None:
    """PEFT rounds it to the base's dtype on loading; `best` keeps what was trained (dtypes are kept)."""
    import torch

    base = oracle.make_base(tmp_path / "base", dtype="bfloat16", pad_token_id=0)
    made = oracle.make_adapter(tmp_path / "made", base, task="SEQ_CLS")
    head = torch.randn(1, 48, generator=torch.Generator().manual_seed(3))
    key = "base_model.model.score.weight"
    adapter = oracle.rewrite_adapter(made, tmp_path / "adapter", change=lambda t: t | {key: head})
    for numerics in ("peft", "best"):
        merged(adapter, tmp_path / numerics, "--base", base.path, "--numerics", numerics)
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), oracle.peft_merge(base, adapter, task="SEQ_CLS"))
    assert oracle.read_tensors(tmp_path / "best")["score.weight"].equal(head)
    oracle.load_output(tmp_path / "best", CLASSIFIER)


def test_reward_adapter_over_the_original_gpt2_becomes_a_reward_model(tmp_path: Path) -> None:
    with_prefix = oracle.make_base(tmp_path / "made", "gpt2", tied=True, pad_token_id=0)
    base = without_prefix(with_prefix, tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    merged(adapter, tmp_path / "out", "--base", base.path)
    forward = oracle.peft_logits(with_prefix, adapter, task="SEQ_CLS")
    model = oracle.load_output(tmp_path / "out", CLASSIFIER)
    assert oracle.relative_difference(oracle.logits(model, inputs_for(base)), forward) < CLOSE


def test_pad_token_of_a_reward_model_comes_from_the_adapters_tokenizer(tmp_path: Path) -> None:
    """Without `pad_token_id` transformers refuses batches of more than one; bases such as Llama's have none."""
    base = oracle.make_base(tmp_path / "base")
    assert oracle.read_config(base.path).get("pad_token_id") is None
    save_tokenizer(base.path, pad=None)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    save_tokenizer(adapter, pad="<pad>")
    merged(adapter, tmp_path / "out", "--base", base.path)
    config = oracle.read_config(tmp_path / "out")
    assert config["pad_token_id"] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    out, own = (oracle.read_config(p, "tokenizer_config.json") for p in (tmp_path / "out", adapter))
    assert out == own
    forward = oracle.peft_logits(base, adapter, task="SEQ_CLS")
    model = oracle.load_output(tmp_path / "out", CLASSIFIER)
    assert oracle.relative_difference(oracle.logits(model, inputs_for(base)), forward) < CLOSE


def test_head_of_three_labels_is_not_called_a_reward(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", pad_token_id=0)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS", labels=3)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    if ran.code == 3:
        assert not (tmp_path / "out").exists()
        return
    assert ran.code == 0
    model = oracle.load_output(tmp_path / "out", CLASSIFIER)
    assert model.config.num_labels == 3
    forward = oracle.peft_logits(base, adapter, task="SEQ_CLS", labels=3)
    assert oracle.relative_difference(oracle.logits(model, inputs_for(base)), forward) < CLOSE


def test_reward_adapter_without_its_head_is_refused(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", pad_token_id=0)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")
    headless = oracle.rewrite_adapter(
        adapter, tmp_path / "headless", change=lambda t: {k: v for k, v in t.items() if "score" not in k}
    )
    before = oracle.listing(tmp_path)
    ran = run("merge-lora", headless, tmp_path / "out", "--base", base.path)
    assert ran.code == 3
    assert "score" in ran.text
    assert oracle.listing(tmp_path) == before


def test_low_rank_head_whose_own_weight_was_never_saved_is_refused(tmp_path: Path) -> None:
    """score = W0 + BA with BA alone in the adapter: W0 was random and is lost (design, section 5)."""
    import torch

    base = oracle.make_base(tmp_path / "base", pad_token_id=0)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS")

    def factorise(tensors: dict[str, Any]) -> None:
        del tensors["base_model.model.score.weight"]
        tensors["base_model.model.score.lora_A.weight"] = torch.ones(3, 48)
        tensors["base_model.model.score.lora_B.weight"] = torch.ones(1, 3)

    lost = oracle.rewrite_adapter(adapter, tmp_path / "lost", change=factorise)
    before = oracle.listing(tmp_path)
    ran = run("merge-lora", lost, tmp_path / "out", "--base", base.path)
    assert ran.code == 3
    assert "head-base-lost" in ran.text
    assert "score" in ran.text
    assert oracle.listing(tmp_path) == before


def test_reward_adapter_over_a_reward_model_keeps_the_model_and_replaces_its_head(tmp_path: Path) -> None:
    """Continued reward training: the base is already a sequence classifier."""
    from oracle.bases import quiet

    causal = oracle.make_base(tmp_path / "causal", pad_token_id=0)
    with quiet():
        causal.load(task="SEQ_CLS", num_labels=1, pad_token_id=0).save_pretrained(tmp_path / "base")
    base = dataclasses.replace(causal, path=tmp_path / "base", auto=CLASSIFIER)
    adapter = oracle.make_adapter(tmp_path / "adapter", causal, task="SEQ_CLS")
    expected = oracle.peft_merge(base, adapter, task="SEQ_CLS")
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
    assert oracle.read_config(tmp_path / "out")["architectures"] == ["LlamaForSequenceClassification"]
    oracle.load_output(tmp_path / "out", CLASSIFIER)


ONE_SIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "both-apart": ("qwen2", {"target_modules": ["embed_tokens", "lm_head"]}),
    "head-saved": ("gemma2", {"modules_to_save": ["lm_head"]}),
    "embedding-saved": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "head-gpt_neox": ("gpt_neox", {"target_modules": ["lm_head", "dense"]}),
    "embedding-opt": ("opt", {"target_modules": ["embed_tokens"]}),
    "head-dora": ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
}


@pytest.mark.parametrize("name", one_in(2, ONE_SIDE))
def test_an_adapter_on_one_side_of_a_tie_unties_it_and_says_what_the_unmerged_model_says(
    name: str, tmp_path: Path
) -> None:
    family, settings = ONE_SIDE[name]
    base = oracle.make_base(tmp_path / "base", family, tied=True, sharded=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, **settings)
    forward = oracle.peft_logits(base, adapter)
    apart = untied_copy(base, tmp_path / "apart")
    expected = oracle.peft_merge(apart, adapter)
    # The oracle of the bits is one only if the untied base with the adapter is the same model.
    assert oracle.relative_difference(oracle.peft_logits(apart, adapter), forward) < CLOSE

    for numerics in ("peft", "best"):
        merged(adapter, tmp_path / numerics, "--base", base.path, "--numerics", numerics)
        assert oracle.read_config(tmp_path / numerics)["tie_word_embeddings"] is False
        said = oracle.logits(oracle.load_output(tmp_path / numerics), inputs_for(base))
        assert oracle.relative_difference(said, forward) < CLOSE
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)
    _assert_index_is_whole(tmp_path / "peft")


@pytest.mark.parametrize("targets", [["lm_head", "c_attn"], ["wte"]], ids=["head", "embedding"])
def test_the_original_gpt2_is_untied_too(targets: list[str], tmp_path: Path) -> None:
    with_prefix = oracle.make_base(tmp_path / "made", "gpt2", tied=True)
    base = without_prefix(with_prefix, tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", with_prefix, target_modules=targets)
    merged(adapter, tmp_path / "out", "--base", base.path)
    assert oracle.read_config(tmp_path / "out")["tie_word_embeddings"] is False
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, oracle.peft_logits(with_prefix, adapter)) < CLOSE


@pytest.mark.parametrize("name", ["head", "embedding", "embedding-gpt2"])
def test_pefts_own_merge_of_one_side_of_a_tie_is_wrong(name: str, tmp_path: Path) -> None:
    """Why PEFT's merge is not an oracle here: it moves both sides. If this test fails, PEFT has changed."""
    family, settings = ONE_SIDE[name]
    base = oracle.make_base(tmp_path / "base", family, tied=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, **settings)
    forward = oracle.peft_logits(base, adapter)
    wrong = dataclasses.replace(base, path=tmp_path / "wrong")
    import shutil

    shutil.copytree(base.path, wrong.path)
    oracle.write_tensors(wrong.path, oracle.peft_merge(base, adapter))
    said = oracle.logits(oracle.load_output(wrong.path), inputs_for(base))
    assert oracle.relative_difference(said, forward) > 0.1


def test_factors_shared_by_both_sides_of_a_tie_are_added_once_to_each(tmp_path: Path) -> None:
    """`ensure_weight_tying`: the head's factors are the embedding's, transposed; PEFT's merge adds the delta twice."""
    base = oracle.make_base(tmp_path / "base", tied=True)
    adapter = oracle.make_adapter(
        tmp_path / "adapter", base, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    merged(adapter, tmp_path / "out", "--base", base.path)
    forward = oracle.peft_logits(base, adapter)
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < CLOSE


@pytest.mark.parametrize("ensure", [False, True], ids=["as-is", "ensured"])
def test_both_sides_of_a_tie_saved_whole(ensure: bool, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", tied=True)
    settings = {"ensure_weight_tying": True} if ensure else {}
    saved = ["embed_tokens"] if ensure else ["embed_tokens", "lm_head"]
    adapter = oracle.make_adapter(tmp_path / "adapter", base, modules_to_save=saved, **settings)
    assert "base_model.model.lm_head.weight" in adapter_tensors(adapter)
    merged(adapter, tmp_path / "out", "--base", base.path)
    forward = oracle.peft_logits(base, adapter)
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < CLOSE


def test_tied_base_that_stores_both_copies_merges_like_one_that_stores_one(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", tied=True)
    twice = untied_copy(base, tmp_path / "twice")
    edit_config(twice.path, tie_word_embeddings=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    head = oracle.make_adapter(tmp_path / "head", base, target_modules=["lm_head"])
    for name, path in (("linear", adapter), ("side", head)):
        merged(path, tmp_path / name, "--base", twice.path)
        said = oracle.logits(oracle.load_output(tmp_path / name), inputs_for(base))
        assert oracle.relative_difference(said, oracle.peft_logits(base, path)) < CLOSE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [171, 150], ids=["grown", "shrunk"])
def test_resized_vocabulary_is_the_adapters(rows: int, tied: bool, tmp_path: Path) -> None:
    def resize(model: Any) -> None:
        model.resize_token_embeddings(rows)

    base = oracle.make_base(tmp_path / "base", tied=tied, dtype="bfloat16")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, prepare=resize)
    assert adapter_tensors(adapter)["base_model.model.model.embed_tokens.weight"].shape[0] == rows
    expected = oracle.peft_merge(base, adapter, prepare=resize)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    assert oracle.read_config(tmp_path / "out")["vocab_size"] == rows
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
    forward = oracle.peft_logits(base, adapter, prepare=resize)
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert said.shape[-1] == rows
    assert oracle.relative_difference(said, forward) < 2e-2


def test_resized_embedding_without_its_head_is_refused(tmp_path: Path) -> None:
    def resize(model: Any) -> None:
        model.resize_token_embeddings(171)

    base = oracle.make_base(tmp_path / "base")
    whole = oracle.make_adapter(tmp_path / "whole", base, prepare=resize)
    adapter = oracle.rewrite_adapter(
        whole, tmp_path / "adapter", change=lambda t: {k: v for k, v in t.items() if "lm_head" not in k}
    )
    before = oracle.listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3
    assert "171" in ran.text
    assert "163" in ran.text
    assert oracle.listing(tmp_path) == before


def test_resized_vocabulary_under_a_reward_head(tmp_path: Path) -> None:
    def resize(model: Any) -> None:
        model.resize_token_embeddings(171)

    base = oracle.make_base(tmp_path / "base", "qwen2", tied=True, pad_token_id=0)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, task="SEQ_CLS", prepare=resize)
    merged(adapter, tmp_path / "out", "--base", base.path)
    forward = oracle.peft_logits(base, adapter, task="SEQ_CLS", prepare=resize)
    model = oracle.load_output(tmp_path / "out", CLASSIFIER)
    assert model.config.vocab_size == 171
    assert oracle.relative_difference(oracle.logits(model, inputs_for(base)), forward) < CLOSE
