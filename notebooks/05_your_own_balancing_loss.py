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
# # 5. Your own balancing loss in 20 lines
#
# A balancing idea is a class with a name. Its fields are what a config may set; it overrides the
# hooks it needs, here only `loss`. To keep an idea, put its file into `moe_jax/routing`. To try
# one, an experiment's own config file will do:

# %%
import subprocess
import sys

import pandas as pd
from IPython.display import Code

from experiments.notebook import ROOT, program, runs, show
from moe_jax.analysis import compare

Code(filename=str(ROOT / 'notebooks' / 'importance.py'), language='python')

# %% [markdown]
# `gate` holds what the router of one layer sees and decides for every token: logits, scores, the
# experts chosen. The importance of an expert is the share of the gates' weight that it gets; the
# loss is its squared coefficient of variation, 0 where all experts are equally important.
#
# The idea now has a name like any other, and its field an override: `--config.balance=importance
# --config.routing.importance.weight=1.0`. A misspelt one is refused before anything starts:

# %%
refused = subprocess.run(
  [
    sys.executable,
    '-m',
    'experiments.run',
    '--config=notebooks/importance.py',
    '--config.balance=importanse',
    '--workdir=runs/none',
  ],
  cwd=ROOT,
  capture_output=True,
  text=True,
)
print(refused.stderr)

# %% [markdown]
# ## Against doing nothing, on the same data
#
# A sweep: no balancing and our loss at two weights, two seeds each. Runs with the same seed start
# from the same weights and see the same text in the same order, so their difference is the
# loss's doing.

# %%
print((ROOT / 'sweeps' / 'importance.py').read_text())
folder = runs() / 'importance'
program('sweeps.run', '--sweep=sweeps/importance.py', f'--workdir={folder}', '--jobs=2')

# %%
results = pd.read_parquet(folder / 'results.parquet')
steps = pd.read_parquet(folder / 'steps.parquet')
results['method'] = results['balance'].where(
  results['balance'] == 'none', 'importance ' + results['routing.importance.weight'].astype(str)
)
vio = 'router/max_vio_global.max'
columns = ['method', 'seed', 'eval/loss', vio, 'router/dead_global.max']
results[columns].round(3)

# %% [markdown]
# ## Does it balance?

# %%
steps = steps.merge(results[['row', 'method', 'seed']], on='row')
of_layers = steps[steps['metric'] == 'router/max_vio']
worst = of_layers.groupby(['method', 'seed', 'step'])['value'].max().reset_index()
curves = {
  method: {seed: run['value'].to_numpy() for seed, run in rows.groupby('seed')}
  for method, rows in worst.groupby('method')
}
at = worst['step'].unique()
show(compare.curves_figure(at, curves, 'MaxVio of the worst layer', baseline='none'))

# %% [markdown]
# ## What does it cost?
#
# Each dot is a seed: its validation loss less that of no balancing at the same seed.

# %%
loss = compare.by_method(results['method'], results['seed'], results['eval/loss'])
balance = compare.by_method(results['method'], results['seed'], results[vio])
show(compare.paired_figure(loss, balance, baseline='none'))
