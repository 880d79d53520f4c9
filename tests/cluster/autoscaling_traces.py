"""Loads to try an autoscaler on: requests per second as functions of time. The random ones are the same every time."""

import math
import random


def constant(rate):
    return lambda t: rate


def noisy(rate, part=0.2, every_s=1.0, seed=0):
    """Around `rate`, never further away than `part` of it; another value every so many seconds."""
    return lambda t: rate * random.Random(f"{seed} {int(t / every_s)}").uniform(1 - part, 1 + part)


def step(before, after, at):
    return lambda t: before if t < at else after


def ramp(last, duration):
    return lambda t: last * t / duration


def burst(base, peak, at, duration):
    return lambda t: peak if at <= t < at + duration else base


def diurnal(low, high, period=86400.0):
    return lambda t: low + (high - low) * (1 - math.cos(2 * math.pi * t / period)) / 2


def sawtooth(low, high, period):
    return lambda t: low + (high - low) * (t % period) / period


def recorded(*values, every_s=60.0):
    """As someone's dashboard showed it, a value a minute; nothing afterwards."""
    return lambda t: values[int(t / every_s)] if t < len(values) * every_s else 0.0


# A chat service's morning: people come, a newsletter goes out at minute 20, lunch from minute 45 on. Requests/s.
MORNING = recorded(
    *(0.1, 0.2, 0.2, 0.4, 0.5, 0.7, 0.8, 1.1, 1.0, 1.3, 1.5, 1.4, 1.8, 2.0, 1.9, 2.2, 2.4, 2.3, 2.5, 2.6),
    *(7.8, 9.5, 8.9, 7.2, 6.1, 5.0, 4.4, 3.9, 3.5, 3.2, 3.0, 2.9, 3.1, 2.8, 2.9, 3.0, 2.7, 2.8, 2.9, 2.6),
    *(2.7, 2.5, 2.4, 2.2, 1.9, 1.4, 1.0, 0.8, 0.6, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0, 0.0),
)
