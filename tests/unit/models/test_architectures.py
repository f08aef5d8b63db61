"""Every tested architecture: the adapter against the untouched model, FLOPs against torch's counter, faults by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM

from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.config.architectures import PRESETS, TESTED, longest_row
from maskvr_ds.models import architectures
from maskvr_ds.models.architectures import check_settings, transformers_config
from maskvr_ds.models.capabilities import check_buffers, check_length, check_model
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.flops import flops_per_sequence, pairs_in_documents
from tests.support.architectures import INSTALLED, SMALL, section

B, L, K, V, PAD = 3, 24, 5, 50, 1


def config_of(architecture: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = ModelConfig.model_validate({**section(architecture, **settings), "untested": True})
    ids = {"cls_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "mask_token_id": 4}
    return transformers_config(model, vocab_size=V, pad_id=PAD, token_ids=ids)


def inputs(padded: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (B, L), generator=generator)
    positions = torch.stack([torch.randperm(L // 2, generator=generator)[:K] for _ in range(B)])
    if not padded:
        return ids, positions, None
    ids[1, L // 2 :] = PAD
    return ids, positions, ids != PAD


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("architecture", INSTALLED)
@torch.no_grad()
def test_logits_are_those_of_the_untouched_model(architecture: str, padded: bool) -> None:
    ours = MaskedLanguageModel(config_of(architecture)).eval()
    reference = AutoModelForMaskedLM.from_config(ours.mlm.config).eval()
    reference.load_state_dict(ours.mlm.state_dict())
    ids, positions, mask = inputs(padded)
    expected = reference(input_ids=ids, attention_mask=mask).logits
    expected = expected.gather(1, positions[..., None].expand(-1, -1, V))
    assert torch.equal(ours(ids, positions, attention_mask=mask), expected)


@pytest.mark.parametrize("architecture", INSTALLED)
def test_flops_are_within_one_per_cent_of_torchs_count(architecture: str) -> None:
    """With windows as wide as the row, since eager attention computes all pairs."""
    wide = {"local_attention": 4 * L} if architecture == "modernbert" else {}
    config = config_of(architecture, **wide)
    config._attn_implementation = "eager"
    ours = MaskedLanguageModel(config)
    ids, positions, _ = inputs(padded=False)
    with FlopCounterMode(display=False) as counter:
        ours(ids, positions, labels=ids[:, :K]).sum().backward()
    assert flops_per_sequence(config, L, K, batch=B) == pytest.approx(counter.get_total_flops() / B, rel=0.01)


@pytest.mark.parametrize("reach", [0, 1, 4, 11, 23, 24, 100])
def test_pairs_in_a_window_are_those_enumerated(reach: int) -> None:
    expected = sum(abs(i - j) <= reach for i in range(L) for j in range(L))
    assert pairs_in_documents(np.array([L]), reach) == expected


def test_flops_of_windows_count_the_pairs_that_the_model_attends_to() -> None:
    """Which pairs a layer attends to is asked of the model: the gradient of one output reaches the window only."""
    config = config_of("modernbert", num_hidden_layers=2)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    mlm = MaskedLanguageModel(config).eval().mlm
    layer = mlm.model.layers[1]
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    hidden: list[torch.Tensor] = []

    def leaf(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden.append(args[0].detach().requires_grad_())
        return (hidden[0], *args[1:]), kwargs

    layer.register_forward_pre_hook(leaf, with_kwargs=True)
    mlm(input_ids=inputs(padded=False)[0][:1])
    reached = 0
    for i in range(L):
        (gradient,) = torch.autograd.grad(seen[0][0, i].sum(), hidden[0], retain_graph=True)
        reached += int((gradient[0].abs().sum(-1) > 0).sum())
    assert reached == pairs_in_documents(np.array([L]), config.sliding_window)
    whole = config_of("modernbert", num_hidden_layers=2, local_attention=4 * L)
    difference = flops_per_sequence(whole, L, K, batch=B) - flops_per_sequence(config, L, K, batch=B)
    assert difference == 3 * 4 * config.hidden_size * (L * L - reached)


@pytest.mark.parametrize("architecture", INSTALLED)
def test_a_full_row_runs_and_every_parameter_is_trained(architecture: str) -> None:
    module = MaskedLanguageModel(config_of(architecture)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert check_model(module, L, torch.bfloat16) == []
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    check_buffers(module)


def test_the_longest_row_is_asked_of_the_model() -> None:
    module = MaskedLanguageModel(config_of("roberta"))  # padding is 1: 64 positions are 62 tokens
    assert check_model(module, 62, torch.float32) == []
    with pytest.raises(ConfigError, match=r"rows of 64 tokens are too long for roberta .* takes at most 62 .* to 66"):
        check_model(module, 64, torch.float32)
    for architecture in ("bert", "modernbert"):
        with pytest.raises(ConfigError, match="rows of 65 tokens exceed max_position_embeddings 64"):
            check_model(MaskedLanguageModel(config_of(architecture)), 65, torch.float32)


def test_long_rows_are_checked_on_one_layer() -> None:
    module = MaskedLanguageModel(config_of("roberta", max_position_embeddings=600)).eval()
    ran: list[int] = []
    module.mlm.base_model.register_forward_hook(lambda *_: ran.append(1))
    check_length(module, 598)
    with pytest.raises(ConfigError, match=r"rows of 600 tokens are too long for roberta .* takes at most 598"):
        check_length(module, 600)
    check_length(MaskedLanguageModel(config_of("modernbert", max_position_embeddings=1024)).eval(), 1024)
    assert not ran


def test_another_padding_token_is_refused() -> None:
    config = config_of("mpnet")
    config.pad_token_id = 0
    with pytest.raises(ConfigError, match=r"mpnet of transformers always takes token 1 for padding, .* pads with 0"):
        check_model(MaskedLanguageModel(config), L, torch.float32)


def test_parameters_without_gradient_are_found() -> None:
    class Unused(MaskedLanguageModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.mlm.base_model.pooler_of_nothing = torch.nn.Linear(2, 2)

    names = ["mlm.roberta.pooler_of_nothing.weight", "mlm.roberta.pooler_of_nothing.bias"]
    assert check_model(Unused(config_of("roberta")), L, torch.float32) == names


def test_rounded_frequencies_are_noticed() -> None:
    module = MaskedLanguageModel(config_of("eurobert"))
    with pytest.raises(AssertionError, match=r"inv_freq is torch.bfloat16"):
        check_buffers(module.bfloat16())


@pytest.mark.parametrize("architecture", ["albert", "mpnet"])
def test_activation_checkpointing_that_does_not_exist_is_an_error(architecture: str) -> None:
    with pytest.raises(ConfigError, match=f"{architecture} of transformers does not support gradient checkpointing"):
        MaskedLanguageModel(config_of(architecture), activation_checkpointing=True)


@pytest.mark.parametrize("architecture", sorted(set(INSTALLED) - {"albert", "mpnet"}))
def test_activation_checkpointing_changes_no_gradient(architecture: str) -> None:
    gradients = []
    ids, positions, _ = inputs(padded=False)
    for checkpointing in (False, True, 1):
        module = MaskedLanguageModel(config_of(architecture), activation_checkpointing=checkpointing).train()
        module(ids, positions, labels=ids[:, :K]).sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            section("modernbert", hidden_sise=32),
            r"hidden_sise: unknown key .*did you mean .*hidden_size",
        ),
        (section("roberta", zzzzzz=1), r"unknown key of RobertaConfig \(roberta\); it has .*hidden_size"),
        ({"settings": {"hidden_act_": "relu"}}, r"unknown key of BertConfig \(bert\); did you mean .*hidden_act"),
        (section("roberta", pad_token_id=3), "pad_token_id: comes from the corpus' tokenizer; remove it"),
        (section("roberta", hidden_size="wide"), "RobertaConfig of transformers refuses them: .*hidden_size"),
        ({"architecture": "robberta", "untested": True}, r"has no such model type \(did you mean 'roberta'\?\)"),
        ({"architecture": "gpt2", "untested": True}, "'gpt2': no masked language model in transformers"),
    ],
)
def test_settings_that_transformers_does_not_know(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(ModelConfig.model_validate(model))


def test_a_type_that_the_installed_version_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(architectures.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "gte", raising=False)
    message = rf"'gte': transformers {transformers.__version__} \(installed\) .* tested with transformers 5\.\d+\.\d+"
    with pytest.raises(ConfigError, match=message):
        check_settings(ModelConfig.model_validate(section("gte")))


def test_sizes_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(ConfigError, match="transformers cannot build a masked language model of type 'roberta'"):
        MaskedLanguageModel(config_of("roberta", num_attention_heads=5))


def test_keys_without_a_default_are_known() -> None:
    assert {"position_buckets", "norm_rel_ebd"} <= SMALL["deberta-v2"].keys()
    assert config_of("deberta-v2").position_buckets == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete(preset: str) -> None:
    check_settings(ModelConfig.model_validate({"preset": preset}))


def test_presets_have_the_published_number_of_parameters() -> None:
    """In millions: table 1 of Lan et al. 2019, which counts a pooler, and the model cards."""
    published = {
        **{"albert-base": 12, "albert-large": 18, "albert-xlarge": 60, "albert-xxlarge": 235},
        **{"roberta-base": 125, "roberta-large": 355, "modernbert-base": 149, "modernbert-large": 395},
    }
    rows = {"albert": 30000, "roberta": 50265, "modernbert": 50368}
    for preset, expected in published.items():
        model = ModelConfig.model_validate({"preset": preset})
        with torch.device("meta"):
            module = MaskedLanguageModel(transformers_config(model, vocab_size=rows[model.architecture], pad_id=1))
        count = sum(p.numel() for p in module.parameters())
        if model.architecture == "albert":
            count += module.mlm.config.hidden_size**2
        assert count / 1e6 == pytest.approx(expected, rel=0.07), preset


def test_token_ids_are_those_of_the_corpus() -> None:
    config = config_of("modernbert")
    ids = (config.pad_token_id, config.cls_token_id, config.sep_token_id, config.bos_token_id, config.eos_token_id)
    assert ids == (1, 0, 2, 0, 2)
    assert config_of("bert").bos_token_id is None


def test_the_documented_table_is_what_the_models_say() -> None:
    """docs/reference/architectures.md: class, longest row, attention, checkpointing."""
    page = (Path(__file__).parents[3] / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if "ForMaskedLM` |" in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0].strip("`") for row in rows] == list(TESTED)
    for name, kind, longest, attention, checkpointing, _ in rows:
        if name.strip("`") not in INSTALLED:
            continue
        module = MaskedLanguageModel(config_of(name.strip("`")))
        lost = int(longest.removeprefix("N").replace(" ", "").replace("−", "-") or "0")
        check_length(module, 64 + lost)
        assert longest_row(name.strip("`"), 64, pad=1) == 64 + lost
        with pytest.raises(ConfigError, match="rows of"):
            check_length(module, 64 + lost + 1)
        found = (type(module.mlm).__name__, module.mlm.config._attn_implementation)
        assert found == (kind.strip("`"), attention)
        assert module.mlm.supports_gradient_checkpointing == (checkpointing == "yes")
