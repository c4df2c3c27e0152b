"""A token sees neither later ones nor those of other rows; rounding does not change the answer."""

import pytest

from lora_tuner import ModelOptions
from lora_tuner.errors import BaseModelError
from lora_tuner.models.loading import load_base
from lora_tuner.models.packing_checks import packing_is_isolated
from lora_tuner.models.resolve import find_base

from .. import model_families
from ..model_families import CONTEXT, save_family

PRECISIONS = ({"dtype": "bfloat16"}, {"load_in": "8bit"}, {"load_in": "4bit", "dtype": "bfloat16"})


def load(folder, **precision):
    return load_base(find_base(str(folder)), ModelOptions(device="cpu", **precision), training=True)


@pytest.mark.parametrize("family", ["recurrent_gemma", "rwkv"])
def test_rounding_is_no_look_ahead(tmp_path, family):
    """In 8 bits a token changes which columns of all tokens are rounded."""
    assert not packing_is_isolated(load(save_family(tmp_path, family), load_in="8bit"))


def test_look_ahead_is_found_in_any_precision(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_tuner.models.unsupported._other_kind", lambda config: None)  # by config.json
    folder = save_family(tmp_path, "bert", is_decoder=False)
    for precision in PRECISIONS:
        with pytest.raises(BaseModelError, match="sees tokens that come later"):
            packing_is_isolated(load(folder, **precision))


@pytest.mark.parametrize(("family", "isolated"), [("llama", True), ("bloom", False)])
def test_isolation_is_same_in_any_precision(tmp_path, family, isolated):
    folder = save_family(tmp_path, family)
    assert {packing_is_isolated(load(folder, **precision)) for precision in PRECISIONS} == {isolated}


def test_output_that_depends_on_length_is_refused(tmp_path, monkeypatch):
    """ProphetNet: a row that is padded would have another loss than alone."""
    settings = {"hidden_size": 32, "num_attention_heads": 4, "decoder_ffn_dim": 48, "num_decoder_layers": 2}
    settings |= {"encoder_ffn_dim": 48, "num_encoder_layers": 1, "max_position_embeddings": CONTEXT}
    monkeypatch.setitem(model_families.FAMILIES, "prophetnet", settings)
    with pytest.raises(BaseModelError, match="gives the first tokens of a longer row other logits"):
        packing_is_isolated(load(save_family(tmp_path, "prophetnet")))
