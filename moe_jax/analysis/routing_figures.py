"""Pictures of what evaluations recorded of the routing (moe_jax.train.routing_record)."""

# N recorded steps  L MoE layers  G domains  E experts

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from moe_jax.analysis import style
from moe_jax.train.routing_record import Routing, mutual_information, overlap, saved_steps

MAX_PANELS = 4


@style.styled
def specialisation_figure(
  workdir: Path, domains: Sequence[str], *, first_layer: int = 0
) -> Figure | None:
  """How much more than its share each domain uses each expert; experts in the order of that.

  Args:
    domains: their names in the order of their ids, which is alphabetical.
    first_layer: index in the model of the first layer with experts.
  """
  steps = saved_steps(workdir)
  if not steps or len(domains) < 2:
    return None
  load_LGE = Routing.load(workdir, steps[-1]).load_LGE
  L, G, _ = load_LGE.shape
  shown = np.unique(np.linspace(0, L - 1, min(L, MAX_PANELS)).round().astype(int))
  fig, grid = style.panels(0.9 + len(shown) * (0.5 + 0.17 * G), rows=len(shown))
  picture = None
  for axes, layer in zip(grid, shown, strict=True):
    share_GE = load_LGE[layer] / np.maximum(load_LGE[layer].sum(0), 1)
    excess_GE = share_GE / np.maximum(share_GE.mean(-1, keepdims=True), 1e-9)
    order_E = np.lexsort((-share_GE.max(0), share_GE.argmax(0)))
    picture = axes.imshow(
      excess_GE[:, order_E], cmap='RdBu_r', vmin=0, vmax=2, aspect='auto', interpolation='nearest'
    )
    axes.set_yticks(range(G), domains)
    axes.set_title(f'layer {first_layer + layer}', pad=3)
    axes.grid(False)
  assert picture is not None
  bar = fig.colorbar(picture, ax=grid, extend='max', aspect=30, pad=0.02)
  bar.set_label('share of the domain in the expert / its mean')
  fig.supxlabel('expert, by the domain it serves most', color=style.GREY, fontsize=10)
  bits_L = mutual_information(load_LGE)
  share_G = load_LGE.sum((0, 2)) / load_LGE.sum()
  whole = -(share_G * np.log2(np.maximum(share_G, 1e-12))).sum()
  finding = (
    f'A choice of expert tells {bits_L.min():.2f} to {bits_L.max():.2f} of the {whole:.2f} bits of '
    f'its domain, most in layer {first_layer + int(bits_L.argmax())}'
  )
  return style.title(fig, finding)


@style.styled
def saturation_figure(workdir: Path, *, first_layer: int = 0) -> Figure | None:
  """Share of a token's choices that are already those of the end (arXiv:2409.02060, figure 18)."""
  steps = saved_steps(workdir)
  if len(steps) < 3:
    return None
  *before, last = (Routing.load(workdir, step).chosen_LTK for step in steps)
  same_NL = np.stack([overlap(chosen_LTK, last) for chosen_LTK in before])
  fig, (axes,) = style.panels(3.2)
  L = same_NL.shape[1]
  for layer in range(L):
    look = {'color': style.depth_colour(layer, L), 'linewidth': 1.4, 'marker': 'o', 'markersize': 3}
    axes.plot(steps[:-1], same_NL[:, layer], label=f'layer {first_layer + layer}', **look)
  axes.set(xlabel='step', ylabel='choices equal to the last', ylim=(0, 1))
  if L <= 6:
    axes.legend(loc='lower right')
  half = next((s for s, same_L in zip(steps, same_NL, strict=False) if same_L.mean() > 0.5), None)
  finding = (
    f'Half of the final choices of experts are made by step {half} of {steps[-1]}'
    if half is not None
    else f'Choices go on changing: {same_NL[-1].mean():.0%} of the final ones are made by step '
    f'{steps[-2]}'
  )
  return style.title(fig, finding)
