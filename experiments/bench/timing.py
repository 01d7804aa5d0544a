"""How a number is measured here: warm, from cold cache, the median of blocked repeats."""

import concurrent.futures
import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.balance.turns import turn

# inputs together larger than this cannot have stayed in any chip's last-level cache
_COLD_BYTES = 256 * 2**20
_LONG_S = 0.1
# a lock file, held while something is timed, see experiments.bench
turns: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
  median_s: float
  # (slowest - fastest) / median over the repeats
  spread: float


def num_copies(args: Sequence[jax.Array]) -> int:
  """Copies of the inputs to go round, so that each call finds its own evicted."""
  return min(16, max(1, -(-_COLD_BYTES // max(1, sum(a.nbytes for a in jax.tree.leaves(args))))))


def compile_all(calls: Iterable[tuple[Callable, tuple]]) -> list[jax.stages.Compiled]:
  """Compiles each call for its arguments, several at a time: most of a suite's time otherwise.

  Functions that are jitted already keep their compiler options.
  """

  def compiled_for(fn: Any, args: tuple) -> jax.stages.Compiled:
    return (fn if hasattr(fn, 'lower') else jax.jit(fn)).lower(*args).compile()

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = [pool.submit(compiled_for, *call) for call in calls]
    return [future.result() for future in compiled]


def peak_gib(compiled: jax.stages.Compiled) -> float | None:
  """Arguments, results and what is between them, as the compiler has planned them."""
  memory = compiled.memory_analysis()
  if memory is None:
    return None
  used = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
  return sum(used) / 2**30


def measure(
  call: Callable, args: Sequence, *, block: Callable, repeats: int = 10, repeat_s: float = 0.02
) -> Timing:
  """Times `call(*args)` over `repeats` blocks of back-to-back calls of about `repeat_s` each.

  Args:
    args: one tuple of arguments for each copy of the inputs (`num_copies`).
    block: waits until the result of a call is there.
  """

  def loop(calls: int) -> float:
    start, result = time.perf_counter(), None
    for i in range(calls):
      result = call(*args[i % len(args)])
    block(result)
    return (time.perf_counter() - start) / calls

  with turn(turns):
    # a call of seconds is warm after one, and its own repeat
    if loop(1) > _LONG_S:
      calls, repeats = 1, min(repeats, 3)
    else:
      loop(2)
      calls = max(2, round(repeat_s / loop(3)))
    times = [loop(calls) for _ in range(repeats)]
  median = statistics.median(times)
  return Timing(median, (max(times) - min(times)) / median)


def measure_jax(fn: Callable, *args: jax.Array, repeats: int = 10) -> Timing:
  """`fn` is jitted already, or compiled."""
  copies = [args] + [jax.tree.map(lambda a: a + 0, args) for _ in range(num_copies(args) - 1)]
  return measure(fn, copies, block=jax.block_until_ready, repeats=repeats)


def measure_together(fn: Callable, *args: jax.Array, calls: int = 6, repeats: int = 5) -> Timing:
  """A call within one program of several, each with inputs of its own.

  For what takes less than to dispatch it: several results cost the host up to 0.4 ms a call.
  """
  copies = [args, *(jax.tree.map(jnp.copy, args) for _ in range(calls - 1))]
  program = jax.jit(lambda copies: [fn(*copy) for copy in copies])
  wait = jax.block_until_ready
  all_ = measure(program, [(copies,)], block=wait, repeats=repeats, repeat_s=0.06)
  return Timing(all_.median_s / calls, all_.spread)
