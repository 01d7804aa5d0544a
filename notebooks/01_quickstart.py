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
# # 1. Train a small mixture of experts, and look inside
#
# One command trains a DeepSeek-V3 in miniature on plays and on Python code: four layers of 16
# experts, of which a token visits two, and a shared one. It takes about a minute on a laptop's
# CPU. A run leaves a folder of files; everything below is read from that folder.

# %%
import json

from experiments.notebook import program, runs, show
from moe_jax.analysis import figures
from moe_jax.train.metrics import read_metrics

workdir = runs() / 'small'
program(
  'experiments.run',
  '--config=experiments/configs/small.py',
  f'--workdir={workdir}',
  show_lines=60,
)

# %% [markdown]
# ## What a run leaves behind
#
# The same command again resumes a run that was cut off, or says that nothing is left to do.

# %%
for path in sorted(workdir.iterdir()):
  if not path.name.startswith('.'):
    print(f'{path.name}{"/" if path.is_dir() else ""}')

# %% [markdown]
# `metrics.jsonl` has a line for each step; `read_metrics` turns it into arrays. A metric of each
# layer has the shape [steps, layers], the load of every expert [steps, layers, experts].

# %%
metrics = read_metrics(workdir)
summary = json.loads((workdir / 'summary.json').read_text())
for name in metrics.names:
  print(f'{name:28}', metrics.series(name)[1].shape)

# %% [markdown]
# ## It learns
#
# The dashed line is what knowing only the frequency of each token would give.

# %%
show(figures.loss_figure(metrics, summary))

# %% [markdown]
# ## Its experts share the work
#
# Nothing in the language loss asks for that: without help a few experts take most tokens.
# Here a bias on each expert's score, moved against its overload after every step, keeps the
# loads together (`--config.balance=loss_free`; notebook 2 compares this with other ideas).

# %%
show(figures.load_figure(metrics))

# %%
show(figures.balance_figure(metrics, summary))

# %% [markdown]
# ## What it costs in parameters
#
# Most parameters lie in experts, most of which a token does not visit.

# %%
sizes = summary['parameters']
share = sizes['active'] / sizes['total']
print(f'{sizes["total"]:,} parameters, of which a token uses {sizes["active"]:,} ({share:.0%})')
print(f'{summary["flops_per_token"]:,.0f} FLOPs a token, forward and backward')

# %% [markdown]
# ## The weights
#
# A checkpoint is one tree. `experiments.generate` lets the model write; this one has seen 150,000
# tokens, so expect words and not sense.

# %%
program(
  'experiments.generate',
  f'--workdir={workdir}',
  '--prompt=KING HENRY:',
  '--num_tokens=60',
)

# %% [markdown]
# Next: [02](02_ablating_routing_losses.ipynb) compares ways of balancing,
# [03](03_what_experts_learn.ipynb) looks at what the experts specialise in.
