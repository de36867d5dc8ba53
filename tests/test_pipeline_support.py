"""`support` and `hf-intervene support` say how a head enters a pipeline; loading one runs no code
that its files name.
"""

import json

import pytest
import recorded
from test_recording import unheard

from hf_intervene import cli, load_base, support


def test_support_says_what_was_recorded():
    found = support(unheard(), "abc")
    assert (found.denoiser, found.site) == ("Unheard", "time_embed, by a vector of width 16")
    assert found.arguments == {
        "inputs.latent": "the sample, in another order, 4 x 8 x 8",
        "progress": "1 - t / 1000",
        "words": "of each image kept, 3",
    }
    assert found.prediction == "the output, in another order, negated"
    assert found.latents == "the sample, in another order, scaled by 3, shifted by 0.5, 4 x 8 x 8"
    # three numbers, and three permutations of 4 x 8 x 8
    assert found.kept_bytes == 3 * 4 + 3 * 256 * 4
    assert "1 - t / 1000" in str(found)
    weights = list(unheard().transformer.parameters())
    assert found.denoiser_parameters == sum(weight.numel() for weight in weights)
    assert found.denoiser_bytes == 4 * found.denoiser_parameters  # float32
    assert f" {found.denoiser_parameters:,} parameters, 0.0 GiB" in str(found)


def test_the_command_prints_it_of_a_folder(tmp_path, capsys):
    pipe, _ = recorded.sdxl_with_text()
    pipe.save_pretrained(tmp_path)
    assert cli.main(["support", str(tmp_path), "--size", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pipeline"] == "StableDiffusionXLPipeline" and found["image_shape"] == [3, 16, 16]
    assert found["site"] == "4 layers of cross-attention, by tokens of width 24"
    assert found["arguments"]["added_cond_kwargs.time_ids"] == "kept, 1 x 6"


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["evil", "Evil"],
        ["diffusers", "os"],
        ["transformers", "pipeline"],
        ["diffusers"],
    ],
)
def test_no_code_is_run_that_a_pipeline_names(tmp_path, entry):
    pipe, _ = recorded.sdxl_with_text()
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_2": entry}))
    with pytest.raises(ValueError, match="only parts of diffusers and transformers are loaded"):
        load_base(tmp_path, 16)
