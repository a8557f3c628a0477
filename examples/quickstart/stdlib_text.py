"""Text that every Python carries: the docstrings of its standard library, and its reference manual in `pydoc_data.topics`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

# Modules that Python 3.11 and later have on Linux and macOS, and that do nothing when imported but define names.
MODULES = """
builtins abc argparse array ast asyncio asyncio.base_events asyncio.events asyncio.futures asyncio.locks asyncio.protocols
asyncio.queues asyncio.runners asyncio.streams asyncio.subprocess asyncio.taskgroups asyncio.tasks asyncio.timeouts
asyncio.transports atexit base64 bdb binascii bisect bz2 calendar cmath cmd code codecs codeop collections collections.abc
colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv ctypes ctypes.util dataclasses
datetime decimal difflib dis doctest email email.charset email.contentmanager email.encoders email.errors email.feedparser
email.generator email.header email.headerregistry email.message email.parser email.policy email.utils encodings.idna ensurepip
enum errno faulthandler filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip
hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.abc
importlib.machinery importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json json.decoder
json.encoder linecache locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder
multiprocessing multiprocessing.connection multiprocessing.context multiprocessing.managers multiprocessing.pool
multiprocessing.queues multiprocessing.shared_memory multiprocessing.sharedctypes multiprocessing.synchronize netrc numbers
operator optparse os os.path pathlib pickle pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr
pydoc queue quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver
sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap
threading time timeit token tokenize tomllib trace traceback tracemalloc types typing unicodedata unittest unittest.async_case
unittest.case unittest.loader unittest.mock unittest.result unittest.runner unittest.suite unittest.util urllib.error
urllib.parse urllib.request urllib.response urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.handlers
wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xml.dom xml.dom.minidom xml.dom.pulldom
xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile
zipimport zlib zoneinfo
""".split()

DEPRECATED = ("typing.io", "typing.re")
"""Names of Python 3.11 that warn when looked at."""
SIGNATURE = re.compile(r"([A-Za-z_]\w*\.)*(?P<name>\w+)\([^\n]*\)( -> [^.\n]*)?")


def stdlib_docstrings() -> tuple[dict[str, str], list[str]]:
    """Docstrings by dotted name ("os.path.join"; builtins without "builtins."), and the modules this Python was built without."""
    docs: dict[str, str] = {}
    missing, seen = [], set()
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # an optional part: ssl, sqlite3, lzma, ...
            missing.append(module_name)
            continue
        prefix = "" if module_name == "builtins" else f"{module_name}."
        if prefix and module.__doc__:
            docs[module_name] = inspect.cleandoc(module.__doc__)
        exported = getattr(module, "__all__", ())
        for name, value in sorted(vars(module).items()):
            at_home = name in exported or getattr(value, "__module__", None) in (module_name, module.__name__, f"_{module_name}")
            kept = at_home and (inspect.isclass(value) or inspect.isroutine(value)) and not name.startswith("__")
            if not kept or id(value) in seen or f"{prefix}{name}" in DEPRECATED:
                continue
            seen.add(id(value))
            docs.update(_docstrings_of(prefix + name, value))
    return docs, missing


def _docstrings_of(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The docstring of a function or class, and of the class's own methods and attributes."""
    if isinstance(value.__doc__, str):
        yield name, inspect.cleandoc(value.__doc__)
    for member_name, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
        member = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        named = "__" not in member_name and member_name not in ("_make", "_replace", "_asdict")  # alike in every named tuple
        if named and (inspect.isroutine(member) or inspect.isdatadescriptor(member)):
            if isinstance(member.__doc__, str):
                yield f"{name}.{member_name}", inspect.cleandoc(member.__doc__)


def paragraphs(text: str) -> list[str]:
    """The prose paragraphs of `text`, one line each, in ASCII, without markup; code, tables, grammar and headings are left out."""
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--"))
    text = re.sub(r":[a-z:]+:`[~.]*([^`]*)`", r"\1", text).replace("`", "")
    text = re.sub(r"\*+(\w+)\*+", r"\1", text)
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in joined if part.isascii() and _is_prose(part)]


def _is_prose(text: str) -> bool:
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return len(text) >= 20 and letters >= 0.85 * len(text) and text[-1] in ".:" and not re.search(r"::=|>>>|->", text)


def first_sentence(name: str, doc: str) -> str | None:
    """The first sentence of a docstring as a response: a capital, words, a period; None where there is none fit to be one."""
    last = name.rpartition(".")[2]
    blocks = re.split(r"\n\s*\n", doc.strip())
    while blocks and (signature := SIGNATURE.fullmatch(blocks[0])) and signature["name"] == last:
        del blocks[0]  # C functions begin with their signature
    text = " ".join(blocks[0].split()) if blocks else ""
    text = re.sub(r"^[\w.]+\([^()]*\) -> [\w ]+?(\.|,| --) +", "", text)  # on the line of the sentence
    text = re.sub(r":[a-z:]+:`[~.]*([^`]*)`", r"\1", text).replace("`", "").replace("*", "")
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!\bvs)(?<!\bcf)\.(?=\s|$)|; | --? ", text)
    text = (text[: end.start()] if end else text).rstrip(" .:;,") + "."
    if not text[:1].isalpha() or not text.isascii():
        return None
    if re.search(r"[][=<>{}\\|#@_~?!]|\.\.|--|- |;|: |->", text):  # code, options, signatures
        return None
    unbalanced = text.count("(") != text.count(")") or text.count('"') % 2 or len(re.findall(r"(?<!\w)'|'(?!\w)", text)) % 2
    if unbalanced or text.startswith(f"{last}(") or re.match(r"(See|Initialize self|Alias for field|Deprecated|Stub)\b", text):
        return None
    words = re.findall(r"[A-Za-z']+", text)
    return text[0].upper() + text[1:] if 3 <= len(words) <= 20 else None


def topic_documents() -> list[str]:
    """The prose of Python's reference manual in pieces of about 600 characters, each paragraph once."""
    from pydoc_data.topics import topics

    documents, seen = [], set()
    for _, text in sorted(topics.items()):
        piece: list[str] = []
        for paragraph in paragraphs(text):
            if paragraph not in seen:
                seen.add(paragraph)
                piece.append(paragraph)
            if sum(map(len, piece)) >= 600:
                documents.append("\n".join(piece))
                piece = []
        if piece:
            documents.append("\n".join(piece))
    return documents
