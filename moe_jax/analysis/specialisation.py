"""What experts learn: pictures and tables of which tokens go where.

Inputs are the counts that an evaluation leaves in a workdir, `moe_jax.train.routing_record`.
"""

# N evaluations  L layers with experts  G domains  E experts  T tokens  K experts a token

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_jax.analysis import style
from moe_jax.analysis.style import BLUE, GREY, ORANGE
from moe_jax.train.metrics import Metrics
from moe_jax.train.routing_record import mutual_information

MAX_PANELS = 6
MIN_COUNT = 5  # choices of a token that are enough to say something of it
SHUFFLES = 8


@style.styled
def domain_figure(load_LGE: np.ndarray, domains: Sequence[str], *, first_layer: int = 0) -> Figure:
  """For each expert, the share of a domain among its tokens; experts sorted within their layer."""
  share_LGE = load_LGE / np.maximum(load_LGE.sum(1, keepdims=True), 1)
  overall_G = load_LGE.sum((0, 2)) / load_LGE.sum()
  # two domains are each other's mirror image
  shown = range(1 if len(domains) == 2 else min(len(domains), MAX_PANELS))
  L, _, E = load_LGE.shape
  columns = min(len(shown), 3)
  rows = -(-len(shown) // columns)
  fig, grid = style.panels(1.3 + rows * (0.5 + 0.28 * L), rows=rows, columns=columns)
  for axes, g in zip(grid, shown, strict=False):
    norm = TwoSlopeNorm(vmin=0, vcenter=overall_G[g], vmax=1)
    sorted_LE = np.sort(share_LGE[:, g], axis=-1)
    image = axes.imshow(sorted_LE, cmap='RdBu_r', norm=norm, aspect='auto')
    axes.set_yticks(range(L), [f'layer {first_layer + i}' for i in range(L)])
    axes.set(xticks=[], xlabel=f'the {E} experts of a layer, sorted')
    axes.set_title(f'share of {domains[g]}: {overall_G[g]:.0%} of all tokens')
    axes.grid(False)
    bar = fig.colorbar(image, ax=axes, aspect=12, pad=0.02, ticks=[0, overall_G[g], 1])
    bar.ax.set_yticklabels(['0', f'{overall_G[g]:.2f}', '1'])
  for axes in grid[len(shown) :]:
    axes.remove()
  # of experts that are in use: a share of three tokens is luck
  used_LE = load_LGE.sum(1) > 0.2 * load_LGE.sum(1).mean(-1, keepdims=True)
  lift_LGE = np.where(used_LE[:, None], share_LGE / overall_G[:, None], 0)
  layer, g, e = np.unravel_index(lift_LGE.argmax(), lift_LGE.shape)
  information_L = mutual_information(load_LGE)
  most = int(information_L.argmax())
  text = (
    f'{share_LGE[layer, g, e]:.0%} of the tokens of one expert in layer {first_layer + layer} are '
    f'{domains[int(g)]} ({overall_G[g]:.0%} overall); layer {first_layer + most} separates domains '
    f'best, {information_L[most]:.2f} bits a choice'
  )
  return style.title(fig, text)


@style.styled
def growth_figure(metrics: Metrics, *, first_layer: int = 0) -> Figure:
  """Over training: what a choice tells of its domain, and how far choices have settled."""
  fig, (left, right) = style.panels(3.4, columns=2)
  ends = {}
  for axes, name, label in (
    (left, 'domain_information', 'bits of domain in a choice of expert'),
    (right, 'overlap', 'choices equal to those one evaluation before'),
  ):
    steps, value_NL = metrics.series(f'router/{name}')
    for layer in range(value_NL.shape[1]):
      colour = style.depth_colour(layer, value_NL.shape[1])
      look = {'color': colour, 'linewidth': 1.6, 'marker': 'o', 'markersize': 3.5}
      axes.plot(steps, value_NL[:, layer], label=f'layer {first_layer + layer}', **look)
    axes.set(xlabel='step', title=label, ylim=(0, None))
    ends[name] = value_NL
  right.set_ylim(0, 1)
  right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:.0%}'))
  if ends['overlap'].shape[1] <= MAX_PANELS:
    right.legend(loc='lower right')
  bits, overlap = (ends[name].mean(1) for name in ('domain_information', 'overlap'))
  steps = metrics.series('router/domain_information')[0]
  verb = 'rises' if bits[-1] > bits[0] else 'falls'
  text = f'What a choice tells of its domain {verb} from {bits[0]:.2f} to {bits[-1]:.2f} bits'
  if bits.max() > 1.25 * max(bits[0], bits[-1]):
    text += f', after {bits.max():.2f} at step {steps[bits.argmax()]}'
  settled = 'settle' if overlap[-1] > overlap[0] else 'do not settle'
  return style.title(
    fig,
    f'{text}; choices {settled}: {overlap[0]:.0%} stay the same at first, {overlap[-1]:.0%} at '
    'the end',
  )


@style.styled
def coactivation_figure(
  pairs_LEE: np.ndarray, *, top_k: int, first_layer: int = 0
) -> Figure | None:
  """How often two experts are chosen together, as a multiple of chance; None for top-1 routing."""
  if top_k < 2:
    return None
  times_LEE = together(pairs_LEE)
  L, E, _ = times_LEE.shape
  shown = np.unique(np.linspace(0, L - 1, min(L, 4)).round().astype(int))
  fig, grid = style.panels(0.9 + style.WIDTH / len(shown) * 0.85, columns=len(shown))
  norm = LogNorm(1 / 8, 8)
  for axes, layer in zip(grid, shown, strict=True):
    seen_EE = np.where(np.eye(E, dtype=bool), np.nan, np.clip(times_LEE[layer], 1 / 8, 8))
    axes.imshow(seen_EE, cmap='RdBu_r', norm=norm)
    axes.set_title(f'layer {first_layer + layer}')
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(False)
    axes.set_xlabel('expert')
  grid[0].set_ylabel('expert')
  bar = fig.colorbar(
    ScalarMappable(norm, 'RdBu_r'),
    ax=grid,
    aspect=18,
    pad=0.02,
    ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8],
    extend='both',
    extendfrac=0.03,
  )
  bar.ax.set_yticklabels(['1/8', '1/4', '1/2', '1', '2', '4', '8'])
  bar.ax.minorticks_off()
  bar.set_label('times as often as by chance')
  layer, i, j = np.unravel_index(np.nan_to_num(times_LEE).argmax(), times_LEE.shape)
  above = np.nanmean(times_LEE > 2, axis=(1, 2))
  return style.title(
    fig,
    f'Experts {min(i, j)} and {max(i, j)} of layer {first_layer + layer} meet '
    f'{times_LEE[layer, i, j]:.1f} times as often as by chance; '
    f"{above.min():.0%} to {above.max():.0%} of a layer's pairs meet more than twice as often",
  )


def together(pairs_LEE: np.ndarray) -> np.ndarray:
  """Tokens that chose both experts over what independent choices of these loads would give.

  Expected counts are those of the loads, scaled to as many pairs as there are; NaN on the diagonal.
  """
  E = pairs_LEE.shape[-1]
  load_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
  off_EE = 1 - np.eye(E)
  counted_LEE = pairs_LEE * off_EE
  expected_LEE = load_LE[:, :, None] * load_LE[:, None, :] * off_EE
  expected_LEE *= counted_LEE.sum((1, 2), keepdims=True) / expected_LEE.sum((1, 2), keepdims=True)
  return np.divide(
    counted_LEE, expected_LEE, out=np.full(counted_LEE.shape, np.nan), where=expected_LEE > 0
  )


@style.styled
def information_figure(
  chosen_LTK: np.ndarray,
  token_T: np.ndarray,
  domain_T: np.ndarray,
  *,
  num_experts: int,
  first_layer: int = 0,
) -> Figure:
  """Bits that a choice tells of the token itself and of its domain, layer by layer.

  A few thousand tokens tell something by luck: what is left after shuffling is taken off.
  """
  frequent_T = np.isin(token_T, *_frequent(token_T))
  of_token_L = information(chosen_LTK[:, frequent_T], token_T[frequent_T], num_experts)
  of_domain_L = information(chosen_LTK, domain_T, num_experts)
  L = len(of_token_L)
  fig, (axes,) = style.panels(3.2)
  at = np.arange(L)
  for shift, value_L, label, colour in (
    (-0.2, of_token_L, 'the token', BLUE),
    (0.2, of_domain_L, 'its domain', ORANGE),
  ):
    bars = axes.bar(at + shift, value_L, 0.36, color=colour, label=label)
    axes.bar_label(bars, fmt='%.2f', color=GREY, padding=2)
  axes.set_xticks(at, [f'layer {first_layer + i}' for i in range(L)])
  axes.set_ylabel('bits in a choice of expert')
  axes.grid(axis='x', visible=False)
  axes.margins(y=0.12)
  axes.legend(title='about', loc='upper right', bbox_to_anchor=(1, 1.12), ncols=2)
  first, last = of_token_L[0], of_token_L[-1]
  verb = 'less' if last < first else 'more'
  ratio = of_token_L.mean() / max(of_domain_L.mean(), 1e-9)
  return style.title(
    fig,
    f'A choice tells {ratio:.1f} times as much of the token as of its domain; deeper layers tell '
    f'{verb} of the token ({first:.2f} bits in layer {first_layer}, {last:.2f} in '
    f'{first_layer + L - 1})',
  )


def _frequent(token_T: np.ndarray) -> tuple[np.ndarray]:
  tokens, counts = np.unique(token_T, return_counts=True)
  return (tokens[counts >= MIN_COUNT],)


def information(chosen_LTK: np.ndarray, label_T: np.ndarray, num_experts: int) -> np.ndarray:
  """Mutual information of a choice and a label of its token, bits, less that of shuffled labels.

  A choice that goes nowhere counts as one more expert.
  """
  _, label_T = np.unique(label_T, return_inverse=True)
  rng = np.random.default_rng(0)

  def raw(label_T: np.ndarray) -> np.ndarray:
    return mutual_information(count_choices(chosen_LTK, label_T, num_experts))

  by_luck = np.mean([raw(rng.permutation(label_T)) for _ in range(SHUFFLES)], axis=0)
  return np.maximum(raw(label_T) - by_luck, 0)


def count_choices(chosen_LTK: np.ndarray, label_T: np.ndarray, num_experts: int) -> np.ndarray:
  """[L, labels, E + 1]: how often tokens of each label chose each expert."""
  num_labels, width = int(label_T.max()) + 1, num_experts + 1
  chosen = np.minimum(chosen_LTK.astype(np.int64), num_experts)
  flat_LTK = label_T[:, None] * width + chosen
  return np.stack(
    [
      np.bincount(flat.ravel(), minlength=num_labels * width).reshape(num_labels, width)
      for flat in flat_LTK
    ]
  )


def favourite_tokens(
  chosen_LTK: np.ndarray,
  token_T: np.ndarray,
  *,
  layer: int,
  num_experts: int,
  decode: Callable[[int], str],
  num: int = 6,
) -> list[tuple[int, str, float]]:
  """Of each expert, by falling concentration: (expert, its favourite tokens, their share).

  A token is a favourite by how much more often it chooses the expert than tokens do on average;
  those seen fewer than `MIN_COUNT` times are left out. The share is that of the expert's choices.
  """
  tokens, label_T = np.unique(token_T, return_inverse=True)
  count_VE = count_choices(chosen_LTK[layer : layer + 1], label_T, num_experts)[0, :, :num_experts]
  seen_V1 = np.maximum(count_VE.sum(-1, keepdims=True), 1)
  load_E = np.maximum(count_VE.sum(0), 1)
  lift_VE = count_VE / seen_V1 / (load_E / load_E.sum())
  weight_VE = np.where(np.bincount(label_T)[:, None] >= MIN_COUNT, lift_VE * np.sqrt(count_VE), 0)
  rows = []
  for e in range(num_experts):
    best = np.argsort(-weight_VE[:, e])[:num]
    best = best[weight_VE[best, e] > 0]
    shown = '  '.join(repr(decode(int(tokens[v]))) for v in best)
    rows.append((e, shown, float(count_VE[best, e].sum() / load_E[e])))
  return sorted(rows, key=lambda row: -row[2])
