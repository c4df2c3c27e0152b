"""Random JSON schemas that some value satisfies, for hypothesis."""

from hypothesis import strategies as st

NAMES = st.text("abcdefgh_", min_size=1, max_size=4)
PATTERNS = ("^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no)$", "[0-9]+", "^x", "^[A-F0-9]{4}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(NAMES, values, max_size=2),
    max_leaves=3,
)


@st.composite
def _numbers(draw):
    kind = draw(st.sampled_from(["integer", "number"]))
    low = draw(st.integers(-1000, 1000))
    schema = {"type": kind}
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = low + draw(st.integers(20, 2000))
    if draw(st.integers(0, 3)) == 0:
        schema["multipleOf"] = draw(st.sampled_from([2, 5, 10]))
    return schema


@st.composite
def _strings(draw):
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return {"type": "string", "pattern": draw(st.sampled_from(PATTERNS))}
    if kind == 1:
        return {"type": "string", "format": draw(st.sampled_from(FORMATS))}
    shortest = draw(st.integers(0, 4))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 8))}


@st.composite
def _objects(draw, schemas):
    properties = draw(st.dictionaries(NAMES, schemas, max_size=4))
    schema = {"type": "object", "properties": properties}
    if properties and draw(st.booleans()):
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    others = draw(st.integers(0, 3))
    if others == 0:
        schema["additionalProperties"] = draw(schemas)
    if others == 1:
        schema["patternProperties"] = {"^[x-z]{1,3}$": draw(schemas)}
    if others > 0:
        schema["additionalProperties"] = False
    return schema


@st.composite
def _arrays(draw, schemas):
    shortest = draw(st.integers(0, 2))
    schema = {"type": "array", "minItems": shortest, "maxItems": shortest + draw(st.integers(0, 3))}
    schema["items"] = draw(schemas)
    if draw(st.integers(0, 3)) == 0:
        schema["prefixItems"] = draw(st.lists(schemas, min_size=1, max_size=2))
    return schema


@st.composite
def _references(draw, schemas):
    """A schema, twice by its name, and a list of a type that has itself as a part."""
    node = {"type": "object", "properties": {"value": draw(schemas), "next": {"$ref": "#/$defs/node"}}}
    node |= {"required": ["value"], "additionalProperties": False}
    pair = {"type": "array", "prefixItems": [{"$ref": "#/$defs/node"}] * 2, "items": False}
    return {"$defs": {"node": node}, "anyOf": [{"$ref": "#/$defs/node"}, pair]}


_LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.just({"type": ["integer", "null"]}),
    _numbers(),
    _strings(),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
)
_TREES = st.recursive(
    _LEAVES,
    lambda schemas: st.one_of(
        _objects(schemas),
        _arrays(schemas),
        st.lists(schemas, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
        schemas.map(lambda schema: {"allOf": [schema, {"title": "t", "description": "d"}]}),
    ),
    max_leaves=6,
)
SCHEMAS = _objects(_TREES) | _TREES | _references(_TREES)
