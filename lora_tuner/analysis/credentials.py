"""Find keys, tokens and passwords in text: by their prefix, or as random values beside their name.

Limits: a secret with neither a known prefix nor a name beside it is not found, and a password that
is an ordinary word counts as an example. Hashes, UUIDs and identifiers alone are no secrets.
"""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_MIN_BITS = 18.0  # entropy of a password; "hunter2" has 19.6 and is a known example
_LONG = 24  # characters from which the words of a placeholder may be chance
_PLACEHOLDER = re.compile(
    r"your|my[_-]|example|sample|change|replace|placeholder|dummy|fake|redacted|insert|enter|here\b|password|passwort|secret"
    r"|token|api[_-]?key|xxx|\*\*\*|\.\.\.|foo|bar\b|0123|1234|abcd|qwert|test|hunter|correcthorse|^none$|^null$|^true$|^false$",
    re.IGNORECASE,
)
# max_length2, self.tokenizer, gpt2-tokenizer-fast, path/to/file.py, 2024-01-15, v1.2.3, 12:30
_IDENTIFIER = re.compile(
    r"[$%@~/.]?(?:[A-Za-z]+\d{0,2}|\d{1,4}[A-Za-z]?)(?:(?:[_./:@=-]|::)+(?:[A-Za-z]+\d{0,2}|\d{1,4}[A-Za-z]?))*[.:/!?]*"
)
_WORDS = re.compile(r"[A-Za-z]+(?:[\W_][A-Za-z]+)*\W*")


def entropy(text: str) -> float:
    """Return the Shannon entropy of the characters of a text, in bits for the whole text."""
    return sum(-count * math.log2(count / len(text)) for count in Counter(text).values())


def is_random(value: str) -> bool:
    """Return whether a value looks like a secret: no word, placeholder, identifier, path or date."""
    has_letters, has_digits = bool(re.search(r"[^\W\d_]", value)), bool(re.search(r"\d", value))
    has_symbols = bool(re.search(r"[^\w.\-/:]", value))
    if not has_letters or not (has_digits or has_symbols) or _IDENTIFIER.fullmatch(value):
        return False
    if _WORDS.fullmatch(value) or re.search(r"^[$%{<]|[)\]}>]$|://", value):
        return False
    if _PLACEHOLDER.search(value) and (len(value) < _LONG or re.match(r"(?i)your|my[_-]|<|example", value)):
        return False
    return entropy(value) >= _MIN_BITS and entropy(value) / len(value) > 2


def _is_mixed(match: re.Match[str]) -> bool:
    """Return whether what follows the prefix is neither words nor the same few characters."""
    rest = match[0][len(match[1]) :]
    return len(set(rest)) > 7 and bool(re.search(r"\d|[a-z][A-Z]|[A-Z][a-z].*[A-Z]", rest))


def _is_model_key(match: re.Match[str]) -> bool:
    runs = re.findall(r"[A-Za-z0-9]{12,}", match[0])
    return any(re.search(r"\d", run) and re.search("[A-Za-z]", run) and entropy(run) > 30 for run in runs)


def _is_jwt(match: re.Match[str]) -> bool:
    header = match[0].partition(".")[0]
    try:
        value = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool({"alg", "typ", "enc"} & value.keys())


def _is_assigned_secret(match: re.Match[str]) -> bool:
    """Return whether a value beside the name of a secret is one, and no program code."""
    if match["quoted"] is not None:
        return is_random(match["quoted"])
    return match["next"] is None and is_random(match["bare"].rstrip(".:!?"))


def _is_bearer(match: re.Match[str]) -> bool:
    return is_random(match["secret"])


def _is_url_password(match: re.Match[str]) -> bool:
    secret = match["secret"]
    return not _PLACEHOLDER.search(secret) and not re.match(r"\$|\[|\{|%\(|\*+$|x+$|\d{1,5}$", secret)


def _always(match: re.Match[str]) -> bool:
    return True


@dataclass(frozen=True)
class _Rule:
    """A kind of secret.

    Attributes:
        hints: Lower-case texts; a row without any of them has no such secret.
        pattern: Group 1 is shown in a masked example; the group `secret`, `quoted` or `bare` is
            replaced, else all of it.
    """

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    is_secret: Callable[[re.Match[str]], bool] = _is_mixed


def _prefixed(kind: str, prefixes: str, rest: str, hints: str = "") -> _Rule:
    """Return the rule of a key that begins with one of `prefixes`, and nowhere inside a word."""
    pattern = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(map(re.escape, prefixes.split()))}){rest}")
    return _Rule(kind, tuple((hints or prefixes).lower().split()), pattern)


_MANY_PREFIXES = (
    "dop_v1_ doo_v1_ shpat_ shpca_ shppa_ shpss_ sq0atp- sq0csp- dapi gsk_ r8_ xai- pplx- hvs. "
    "hvb. lin_api_ ntn_ figd_ glsa_ sntrys_ sntryu_ dckr_pat_ rubygems_ tfp_ pscale_tkn_ dp.pt. "
    "nvapi- AGE-SECRET-KEY-1 key-"
)
_NAMES = (
    r"(?:pass(?:word|wd|phrase|code)?|pwd|pw|secret|credentials?|kennwort|passwort|mot[ _]de[ _]passe|contrase\xf1a|senha"
    r"|(?:api|access|auth|secret|private|account|shared|signing|encryption|master|subscription|storage|app)[ _-]?"
    r"(?:key|token|secret|password)(?:[ _-]?id)?|(?:auth|bearer|refresh|session|id|bot|user|client)?[ _-]?token"
    r"|client[ _-]?secret)"
)
_NAME_HINTS = ("pass", "pwd", "pw", "secret", "credential", "kennwort", "contrase\xf1a", "senha", "key", "token")
_QUOTE = r"(?:\\?[\"'`]|&quot;|&#39;)"
_ASSIGNMENT = (
    rf"(?<![A-Za-z])((?:[A-Za-z0-9]{{1,30}}[_.-]){{0,4}}{_NAMES}){_QUOTE}?\s{{0,3}}(?::=|=>|==?|:|\bis\b:?|\bist\b)\s{{0,3}}"
    rf"(?:{_QUOTE}(?P<quoted>[^\s\"'`\\]{{6,500}}?)(?={_QUOTE})"
    r"|(?P<bare>(?:[^\s\"'`\\,;()\[\]{}<>&|]|&(?![\w.-]+=)){6,500})(?P<next>[(\[{])?)"
)
_BEGIN, _END = (rf"-----{word} (?:[A-Z0-9]+ ){{0,4}}PRIVATE KEY(?: BLOCK)?-----" for word in ("BEGIN", "END"))
_RULES = (
    # To its end; without one, as far as it looks like the inside of a key.
    _Rule(
        "private key",
        ("private key",),
        re.compile(
            rf"({_BEGIN})(?:(?:(?!-----BEGIN ).){{0,20000}}?{_END}|(?:[A-Za-z0-9+/=:,\s-]|\\[rn])*)", re.DOTALL
        ),
        _always,
    ),
    _prefixed("AWS key", "AKIA ASIA ABIA ACCA", r"[A-Z0-9]{16}(?![A-Za-z0-9])"),
    _prefixed("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"[A-Za-z0-9_]{30,255}"),
    _prefixed(
        "GitLab token",
        "glpat- glptt- gldt- glrt- glcbt- glsoat- glft- glimt- glagent- gloas-",
        r"[A-Za-z0-9_.-]{20,}",
        hints="gl",
    ),
    _prefixed("Hugging Face token", "hf_ api_org_", r"[A-Za-z0-9]{30,}"),
    _prefixed(
        "Slack token",
        "xoxa- xoxb- xoxc- xoxd- xoxe- xoxe.xoxb- xoxe.xoxp- xoxo- xoxp- xoxr- xoxs- xapp-",
        r"[A-Za-z0-9-]{10,}",
        hints="xox xapp-",
    ),
    _Rule(
        "Slack webhook",
        ("hooks.slack.com",),
        re.compile(
            r"(https://hooks\.slack\.com/)(?:services|workflows|triggers)/(?P<secret>[A-Za-z0-9/_-]{20,})"
        ),
        _always,
    ),
    _Rule(
        "Discord webhook",
        ("/api/webhooks/",),
        re.compile(r"(https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/)(?P<secret>\d{15,}/[\w-]{40,})"),
        _always,
    ),
    _prefixed("Google key", "AIza GOCSPX- ya29.", r"[A-Za-z0-9_-]{24,}"),
    _prefixed(
        "Stripe key",
        "sk_live_ sk_test_ rk_live_ rk_test_ pk_live_ pk_test_ whsec_",
        r"[A-Za-z0-9]{16,}",
        hints="k_live_ k_test_ whsec_",
    ),
    _prefixed("SendGrid key", "SG.", r"[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    _prefixed("npm token", "npm_", r"[A-Za-z0-9]{36}"),
    _prefixed("PyPI token", "pypi-Ag", r"[A-Za-z0-9_-]{30,}"),
    _prefixed("Twilio key", "SK AC", r"[0-9a-f]{32}(?![A-Za-z0-9])"),
    _Rule("Telegram token", (":aa",), re.compile(r"(?<!\w)(\d{8,10}:AA)[A-Za-z0-9_-]{32,}")),
    _prefixed("other token", _MANY_PREFIXES, r"(?=[\w.+/=-]*\d)(?=[\w.+/=-]*[A-Za-z])[A-Za-z0-9_.+/=-]{24,}"),
    _Rule(
        "model API key",
        ("sk-",),
        re.compile(r"(?<![\w-])(sk-(?:ant|proj|svcacct|admin|or)?-?)[A-Za-z0-9_-]{20,}"),
        _is_model_key,
    ),
    _Rule(
        "JSON web token",
        ("eyj",),
        re.compile(r"(?<![\w.-])(eyJ)[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]*"),
        _is_jwt,
    ),
    _Rule(
        "bearer token",
        ("bearer", "basic", "token"),
        re.compile(
            rf"((?:Bearer|Basic|Token)\s+){_QUOTE}?(?P<secret>[A-Za-z0-9_.~+/-]{{16,2000}}={{0,2}})",
            re.IGNORECASE,
        ),
        _is_bearer,
    ),
    _Rule(
        "password in a URL",
        ("://",),
        re.compile(
            r"(?<![A-Za-z0-9])([a-z][a-z0-9+.-]{1,20}://)[^\s:/@\"'<>?#]{0,100}:(?P<secret>[^\s/@\"'<>]{3,200})@(?=[\w.\[-])",
            re.IGNORECASE,
        ),
        _is_url_password,
    ),
    _Rule("password or key", _NAME_HINTS, re.compile(_ASSIGNMENT, re.IGNORECASE), _is_assigned_secret),
)


def find_secrets(text: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield start, end, kind and masked text of each key, token and password; some may overlap."""
    lower = text.lower()
    for rule in _RULES:
        if not any(hint in lower for hint in rule.hints):
            continue
        for match in rule.pattern.finditer(text):
            if rule.is_secret(match):
                groups = match.groupdict()
                group = next((name for name, value in groups.items() if value and name != "next"), 0)
                yield *match.span(group), rule.kind, _mask(rule.kind, match[1])


def _mask(kind: str, shown: str) -> str:
    shown = " ".join(shown.split())[:60]
    if kind == "password or key":
        shown += "="
    elif kind in ("private key", "bearer token"):
        shown += " "
    return f"{shown}****"
