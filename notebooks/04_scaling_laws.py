# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Scaling laws
#
# With a given number of FLOPs one may train a large model on few tokens or a small one on many.
# `sweeps/scaling.py` spends each of three budgets on several sizes, and `moe_jax.analysis.scaling`
# fits
#
# $$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$
#
# to the validation losses, as Hoffmann et al. (arXiv:2203.15556) did for Chinchilla: Huber loss
# of log loss, several starts, and a bootstrap for the intervals.
#
# The models here are tiny (10,000 to 80,000 parameters, on bytes), the budgets a millionth of a
# millionth of real ones. What carries over is the method, not the numbers.

# %%
import numpy as np
import pandas as pd

from experiments.notebook import ROOT, program, runs, show
from moe_jax.analysis import scaling
from moe_jax.analysis.scaling_figures import Runs, isoflop_figure
from sweeps.budget import nearest_budget
from sweeps.scaling import BUDGETS

print((ROOT / 'sweeps' / 'scaling.py').read_text())

# %%
folder = runs() / 'scaling'
program('sweeps.run', '--sweep=sweeps/scaling.py', f'--workdir={folder}', '--jobs=2', show_lines=6)

# %% [markdown]
# ## The runs
#
# Budgets are met to within half a step. Every size has its own learning rate, schedule and number
# of steps.

# %%
results = pd.read_parquet(folder / 'results.parquet')
flops = results['flops_per_token'] * results['tokens']
results['budget'] = [nearest_budget(f, BUDGETS) for f in flops]
results[
  ['budget', 'parameters.total', 'parameters.active', 'tokens', 'steps', 'eval/loss']
].sort_values(['budget', 'parameters.active']).set_index('budget').round(3)

# %% [markdown]
# ## The law, by active and by total parameters
#
# All sizes here keep the same 2 of 16 experts, so active and total parameters rise together and
# the two laws say nearly the same. A sweep over the number of experts would tell them apart.


# %%
def runs_by(parameters: str) -> Runs:
  columns = ['budget', parameters, 'tokens', 'eval/loss', 'flops_per_token']
  return Runs(*(results[name].to_numpy(float) for name in columns))


by_active, by_total = runs_by('parameters.active'), runs_by('parameters.total')
fits = {
  name: scaling.fit_law(r.params_R, r.tokens_R, r.loss_R)
  for name, r in {'active': by_active, 'total': by_total}.items()
}
rows = []
for name, fit in fits.items():
  for field in (*scaling.Law._fields, 'size_exponent'):
    low, high = fit.interval(lambda law, field=field: getattr(law, field))
    rows.append((name, field, getattr(fit.law, field), low, high))
table = pd.DataFrame(rows, columns=['parameters', 'of the law', 'fit', '5%', '95%'])
table.set_index(['parameters', 'of the law']).map('{:.3g}'.format)

# %% [markdown]
# ## What a budget buys
#
# Each curve has a lowest point: smaller models are too small for the tokens they see, larger ones
# see too few.

# %%
show(isoflop_figure(by_active, fits['active'], parameters='active parameters'))

# %%
show(isoflop_figure(by_total, fits['total'], parameters='total parameters'))

# %% [markdown]
# ## Does the law hold?
#
# Its residuals, and how well the law of the two small budgets foretells the large one.

# %%
fit = fits['active']
print(f'residuals: {100 * np.abs(fit.residual_R).mean():.2f}% of the loss, on average')
small = by_active.budget_R < max(BUDGETS)
try:
  ahead = scaling.fit_law(*(a[small] for a in by_active[1:4]), num_bootstrap=1)
  r = Runs(*(a[~small] for a in by_active))
  error = ahead.law.loss(r.params_R, r.tokens_R) / r.loss_R - 1
  print(f'the largest budget, foretold from the others: {100 * error.mean():+.1f}%')
except ValueError as e:
  print(e)
