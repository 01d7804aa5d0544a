"""correctness on the device, then kernel-only times"""
import os,sys; sys.path.insert(0,'.')
os.environ['XLA_PYTHON_CLIENT_PREALLOCATE']='false'
import jax, jax.numpy as jnp, numpy as np, dataclasses
from moe_jax.ops.grouped_matmul import specs, xla, mosaic_gpu, grouped_matmul, layout, mosaic_rows, mosaic_weights, tiles
from experiments.bench import timing
print(jax.devices(), flush=True)
rel=lambda a,b: float(np.linalg.norm(np.asarray(a,np.float64)-np.asarray(b,np.float64))/max(1e-30,np.linalg.norm(np.asarray(b,np.float64))))
for s in specs.UGLY:
  E=len(s.sizes); sz=jnp.array(s.sizes,jnp.int32); o=layout.compact_offsets(sz) if s.offsets is None else jnp.array(s.offsets,jnp.int32)
  own=np.zeros(s.rows,bool)
  for a,b in zip(np.asarray(o),s.sizes): own[a:a+b]=True
  k=jax.random.split(jax.random.key(0),3)
  x=jnp.where(own[:,None],jax.random.normal(k[0],(s.rows,s.d),jnp.bfloat16),jnp.nan)
  dy=jnp.where(own[:,None],jax.random.normal(k[1],(s.rows,s.f),jnp.bfloat16),jnp.nan)
  w=jax.random.normal(k[2],(E,s.d,s.f),jnp.bfloat16)
  f=lambda m: jax.jit(lambda x,w,dy:(m.forward(x,w,o,sz),m.forward(dy,w,o,sz,transpose_w=True),m.weight_grad(x,dy,o,sz,dtype=jnp.dtype('float32')),m.weight_grad(x,dy,o,sz,dtype=jnp.dtype('bfloat16'))))(x,w,dy)
  a,b,c=f(mosaic_gpu),f(xla),f(mosaic_gpu)
  print(s.name,[f'{rel(p,q):.1e}' for p,q in zip(a,b)],'bitwise',all(bool(jnp.array_equal(p,q)) for p,q in zip(a,c)),flush=True)
