"""The family's learning-rate schedules, each after a linear warm-up."""

import optax

from moe_jax.config import OptimConfig


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Learning rate of every optimizer step.

  constant: lr_peak. steps: lr_peak, times step_factor at each of step_fractions (V1, V2). cosine:
  down to lr_end_fraction * lr_peak at the last step (V3's decay). wsd: constant, then linear to the
  same end over the last decay_fraction of the steps (arXiv:2404.06395).
  """
  peak, end = cfg.lr_peak, cfg.lr_peak * cfg.lr_end_fraction
  warmup = min(cfg.warmup_steps, steps)
  rest = max(steps - warmup, 1)
  match cfg.schedule:
    case 'constant':
      main = optax.constant_schedule(peak)
    case 'cosine':
      main = optax.cosine_decay_schedule(peak, rest, alpha=cfg.lr_end_fraction)
    case 'steps':
      # boundaries are shares of all steps; join_schedules counts from the end of the warm-up
      drops = {max(round(f * steps) - warmup, 0): cfg.step_factor for f in cfg.step_fractions}
      main = optax.piecewise_constant_schedule(peak, drops)
    case 'wsd':
      decay = max(round(cfg.decay_fraction * steps), 1)
      main = optax.linear_schedule(peak, end, decay, transition_begin=max(rest - decay, 0))
    case other:
      raise ValueError(f'optim.schedule={other!r} is not known.')
  if not warmup:
    return main
  # the first step already moves: (i + 1) / warmup of the peak at step i
  rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else main
  return optax.join_schedules([rise, main], [warmup])
