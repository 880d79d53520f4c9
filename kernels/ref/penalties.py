"""Penalties and what they are counted by. Shapes and contracts: `octavo.kernels.ops`."""

import torch

from octavo.kernels.sampling import Ints, Penalised, Tallies


def apply_penalties(logits: torch.Tensor, tallies: Tallies, penalised: Penalised) -> None:
    if not penalised.longest:
        return
    device = logits.device
    at, row = (torch.from_numpy(x).to(device)[:, None] for x in (penalised.places, penalised.rows))
    factors = penalised.repetition, penalised.frequency, penalised.presence
    repetition, frequency, presence = (torch.from_numpy(x).to(device)[:, None] for x in factors)
    ids = tallies.seen[at[:, 0], : penalised.longest]
    # Of a list's end nobody is asked: what a token suffers is read from the tables, so naming one more is harmless.
    counts = tallies.counts[at, ids]
    repetition = torch.where(tallies.known[at, ids], repetition, 1.0)
    values = logits[row, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    logits[row, ids] = values  # an id named twice is written twice with one value


def count_tokens(tallies: Tallies, places: Ints, rows: Ints, token_ids: torch.Tensor) -> None:
    at = torch.from_numpy(places).to(token_ids.device)
    drawn = token_ids[torch.from_numpy(rows).to(token_ids.device)]
    end = tallies.num_seen[at]
    tallies.seen[at, end] = drawn  # past the end if known already: the next new one overwrites it
    tallies.num_seen[at] = end + ~tallies.known[at, drawn]
    tallies.known[at, drawn] = True
    tallies.counts[at, drawn] += 1
