"""Every output of a random model is valid: 50 difficult JSON schemas × 4 seeds at temperature 1, in one batch."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from octavo.engine.api import LLM
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from schemas import SCHEMAS

SEEDS = range(4)
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.fixture(scope="module")
def llm(random_model):
    llm = LLM(str(random_model), load_format="dummy", dtype="float32", max_model_len=2048, max_num_seqs=64)
    yield llm
    llm.close()


def faults(schema, output) -> list[str]:
    """What is wrong with an output; nothing, if it ended by itself and is valid, formats included."""
    if output.finish_reason != "stop":
        return [f"ended by {output.finish_reason} after {len(output.token_ids)} tokens"]
    try:
        value = json.loads(output.text)
    except ValueError as error:
        return [f"{error}: {output.text!r}"]
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return [
        f"{error.message}: {output.text!r}"
        for error in kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value)
    ]


def test_there_are_fifty_and_they_are_schemas():
    assert len(SCHEMAS) == 50
    for schema in SCHEMAS.values():
        jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
    assert {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"} <= set(
        FORMATS.checkers
    )


def test_every_output_is_valid(llm):
    wanted = [(name, seed) for name in SCHEMAS for seed in SEEDS]
    params = [
        SamplingParams(
            temperature=1.0, max_tokens=2000, seed=seed, structured_outputs=StructuredOutputs(json=SCHEMAS[name])
        )
        for name, seed in wanted
    ]
    outputs = [out.outputs[0] for out in llm.generate([[0, 5]] * len(wanted), params, use_tqdm=False)]
    wrong = {
        f"{name}, seed {seed}": found
        for (name, seed), output in zip(wanted, outputs, strict=True)
        if (found := faults(SCHEMAS[name], output))
    }
    assert wrong == {}
    assert len({output.text for output in outputs}) > 150  # they are drawn, not given
