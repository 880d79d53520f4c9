"""What is read of a sentence-transformers folder, by its conventions of before and of today."""

import json
from pathlib import Path

import pytest

from octavo.engine.errors import ConfigError
from octavo.engine.pooling.folder import SentenceFolder, read_sentence_folder

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."


def write(folder: Path, kinds: list[str], pooling: dict, **files: object) -> Path:
    modules = [
        {"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{kind.rpartition('.')[2]}", "type": kind}
        for i, kind in enumerate(kinds)
    ]
    for entry in modules:
        (folder / entry["path"]).mkdir(exist_ok=True)
        if entry["path"].endswith("_Pooling"):
            (folder / entry["path"] / "config.json").write_text(json.dumps(pooling))
    for name, value in ({"modules": modules} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_all_of_it(tmp_path):
    folder = write(
        tmp_path,
        [f"{OLD}Transformer", f"{OLD}Pooling", f"{OLD}Normalize"],
        {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": True},
        sentence_roberta_config={"max_seq_length": 77, "do_lower_case": False},
        config_sentence_transformers={"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"},
    )
    assert read_sentence_folder(folder) == SentenceFolder(
        "last", True, 77, prompts=(("query", "q: "), ("document", "")), default_prompt="query"
    )


def test_the_newer_form_and_what_is_left_out(tmp_path):
    folder = write(tmp_path, [f"{NEW}transformer.Transformer", f"{NEW}pooling.Pooling"], {"pooling_mode": "cls"})
    assert read_sentence_folder(folder) == SentenceFolder("cls", False)


def test_a_plain_folder_and_a_cross_encoder_are_none(tmp_path):
    assert read_sentence_folder(tmp_path) is None
    settings = {"model_type": "CrossEncoder"}
    folder = write(tmp_path, [f"{NEW}Transformer"], {}, config_sentence_transformers=settings)
    assert read_sentence_folder(folder) is None


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (["Transformer", "Pooling", "WordWeights"], {}, "'WordWeights' are not supported"),
        (["Transformer"], {}, "one Pooling module, but names 0"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "by max is not supported"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "by cls and mean is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, kinds, pooling, message):
    with pytest.raises(ConfigError, match=message):
        read_sentence_folder(write(tmp_path, [OLD + kind for kind in kinds], pooling))
