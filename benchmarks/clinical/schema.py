"""Meaning and allowed values of the 50 columns of Diabetes 130-US hospitals (1999-2008).

Strack et al. 2014, doi 10.1155/2014/781670. Everything is read as text, for "None" and "?" are codes.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Literal

import pandas as pd
import pandera.pandas as pa
from pydantic import BaseModel, ConfigDict

VERSION = "1"
ENCOUNTERS, CODES = "diabetic_data.csv", "IDs_mapping.csv"
MISSING = "?"
SHOWN = 5
"""Rows that an error names."""

Role = Literal["identifier", "sensitive", "feature", "outcome"]


class ClinicalError(ValueError):
    """The records cannot be used; the message says column, rule and rows."""


class Column(BaseModel):
    """Column of the records: meaning, role, allowed values, marks of a missing value."""

    model_config = ConfigDict(frozen=True)

    name: str
    meaning: str
    role: Role = "feature"
    unit: str = ""
    values: tuple[str, ...] = ()
    """What it may hold, besides `missing`."""
    low: int | None = None
    high: int | None = None
    """A whole number, both ends included."""
    pattern: str = ""
    missing: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        """Kind of the values."""
        return "whole number" if self.low is not None else "code" if self.pattern else "category"

    @property
    def rule(self) -> str:
        """Allowed values, in words."""
        also = f", or {' or '.join(self.missing)} where missing" if self.missing else ""
        if self.low is not None:
            return f"a whole number from {self.low} to {self.high}{also}"
        if self.pattern:
            return f"text like {self.pattern}{also}"
        return f"one of {', '.join(self.values)}{also}"

    def holds(self, values: pd.Series) -> pd.Series:
        """Return whether each value keeps the rule."""
        found = values.isin([*self.values, *self.missing])
        if self.low is not None:
            whole = values.str.fullmatch(r"\d{1,12}")
            found |= whole & pd.to_numeric(values.where(whole), errors="coerce").between(
                self.low, self.high
            )
        if self.pattern:
            found |= values.str.fullmatch(self.pattern)
        return found


def _ages(step: int, stop: int) -> tuple[str, ...]:
    return tuple(f"[{low}-{low + step})" for low in range(0, stop, step))


def _count(name: str, meaning: str, low: int, high: int, unit: str = "") -> Column:
    return Column(name=name, meaning=meaning, low=low, high=high, unit=unit)


DRUGS = (
    "metformin",
    "repaglinide",
    "nateglinide",
    "chlorpropamide",
    "glimepiride",
    "acetohexamide",
    "glipizide",
    "glyburide",
    "tolbutamide",
    "pioglitazone",
    "rosiglitazone",
    "acarbose",
    "miglitol",
    "troglitazone",
    "tolazamide",
    "examide",
    "citoglipton",
    "insulin",
    "glyburide-metformin",
    "glipizide-metformin",
    "glimepiride-pioglitazone",
    "metformin-rosiglitazone",
    "metformin-pioglitazone",
)
DIAGNOSES = ("diag_1", "diag_2", "diag_3")
ICD9 = r"\d{1,3}(\.\d{1,2})?|V\d{2}(\.\d{1,2})?|E\d{3}(\.\d)?"
AGES = _ages(10, 100)

COLUMNS = (
    Column(name="encounter_id", meaning="One stay in hospital", role="identifier", low=1, high=10**12),
    Column(name="patient_nbr", meaning="One patient", role="identifier", low=1, high=10**12),
    Column(
        name="race",
        meaning="As recorded",
        role="sensitive",
        values=("Caucasian", "AfricanAmerican", "Hispanic", "Asian", "Other"),
        missing=(MISSING,),
    ),
    Column(
        name="gender",
        meaning="As recorded",
        role="sensitive",
        values=("Female", "Male"),
        missing=("Unknown/Invalid",),
    ),
    Column(name="age", meaning="Age band", role="sensitive", unit="years", values=AGES),
    Column(
        name="weight",
        meaning="Weight band",
        unit="pounds",
        values=(*_ages(25, 200), ">200"),
        missing=(MISSING,),
    ),
    _count("admission_type_id", "How admitted, see IDs_mapping.csv", 1, 8),
    _count("discharge_disposition_id", "Where to discharged, see IDs_mapping.csv", 1, 30),
    _count("admission_source_id", "Where from, see IDs_mapping.csv", 1, 26),
    _count("time_in_hospital", "From admission to discharge", 1, 14, "days"),
    Column(
        name="payer_code",
        meaning="Who pays",
        role="sensitive",
        pattern=r"[A-Z]{2}",
        missing=(MISSING,),
    ),
    Column(
        name="medical_specialty",
        meaning="Of the admitting physician",
        pattern=r"[A-Za-z&/-]+(-[A-Za-z&/]+)*",
        missing=(MISSING,),
    ),
    _count("num_lab_procedures", "Lab tests during the stay", 0, 200),
    _count("num_procedures", "Other procedures during the stay", 0, 20),
    _count("num_medications", "Distinct generic drugs during the stay", 0, 200),
    _count("number_outpatient", "Outpatient visits in the year before", 0, 365),
    _count("number_emergency", "Emergency visits in the year before", 0, 365),
    _count("number_inpatient", "Stays in the year before", 0, 365),
    *(
        Column(name=name, meaning=meaning, pattern=ICD9, missing=(MISSING,))
        for name, meaning in zip(
            DIAGNOSES,
            ("Primary diagnosis, ICD-9", "Second diagnosis, ICD-9", "Third diagnosis, ICD-9"),
            strict=True,
        )
    ),
    _count("number_diagnoses", "Diagnoses entered", 1, 16),
    Column(
        name="max_glu_serum",
        meaning="Glucose serum test; None was not taken",
        unit="mg/dL",
        values=("None", "Norm", ">200", ">300"),
    ),
    Column(
        name="A1Cresult",
        meaning="HbA1c test; None was not taken",
        unit="%",
        values=("None", "Norm", ">7", ">8"),
    ),
    *(
        Column(name=drug, meaning=f"Dosage of {drug}", values=("No", "Steady", "Up", "Down"))
        for drug in DRUGS
    ),
    Column(name="change", meaning="Any change of diabetic drugs", values=("No", "Ch")),
    Column(name="diabetesMed", meaning="Any diabetic drug prescribed", values=("No", "Yes")),
    Column(
        name="readmitted",
        meaning="Days to the next stay as inpatient",
        role="outcome",
        values=("NO", "<30", ">30"),
    ),
)
BY_NAME = {column.name: column for column in COLUMNS}


def table_schema() -> pa.DataFrameSchema:
    """The columns as pandera checks them: all of them, in any order, each by its rule, stays unique."""

    def checked(column: Column) -> pa.Column:
        check = pa.Check(column.holds, name=column.rule, error=column.rule, n_failure_cases=None)
        return pa.Column(str, check, unique=column.name == "encounter_id")

    return pa.DataFrameSchema({c.name: checked(c) for c in COLUMNS}, strict=True)


def validated(table: pd.DataFrame) -> pd.DataFrame:
    """The table, if every column keeps its rule.

    Raises:
        ClinicalError: the first column that does not, its rule, how many rows, and the first of them.
    """
    if table.empty:
        raise ClinicalError(f"{ENCOUNTERS} has no rows")
    missing = [name for name in BY_NAME if name not in table]
    if missing:
        raise ClinicalError(f"{ENCOUNTERS} lacks the column {missing[0]!r} ({len(missing)} in all)")
    try:
        return table_schema().validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        failures = error.failure_cases
    first = failures.iloc[0]
    name = first["column"] if first["column"] in BY_NAME else first["failure_case"]
    if name not in BY_NAME:
        raise ClinicalError(f"{ENCOUNTERS} has a column {name!r} that is not known")
    own = failures[failures["column"] == name].sort_values("index")
    rule = "each once" if first["check"] == "field_uniqueness" else BY_NAME[name].rule
    rows = own["index"].drop_duplicates()
    first_few = own[["index", "failure_case"]].head(SHOWN).itertuples(index=False)
    shown = ", ".join(f"row {int(index)}: {value!r}" for index, value in first_few)
    raise ClinicalError(f"column {name!r} must hold {rule}; {len(rows)} rows do not ({shown})")


def read_tables(path: Path) -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """The encounters, validated, and what the codes of three columns mean.

    Raises:
        ClinicalError: the file is no zip, lacks a table, or a table is not what it should be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            named = {Path(name).name: name for name in archive.namelist()}
            texts = {name: archive.read(named[name]) for name in (ENCOUNTERS, CODES)}
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise ClinicalError(f"{path} is not a readable zip file: {error}") from error
    except KeyError as error:
        raise ClinicalError(f"{path} has no {error.args[0]}") from error
    return validated(_csv(texts[ENCOUNTERS], ENCOUNTERS)), _codes(texts[CODES])


def _csv(content: bytes, name: str) -> pd.DataFrame:
    try:
        return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ClinicalError(f"{name} is no table: {error}") from error


def _codes(content: bytes) -> dict[str, dict[str, str]]:
    """Three tables one below the other, each with its own head."""
    found: dict[str, dict[str, str]] = {}
    lines = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, header=None)
    for code, meaning in lines.itertuples(index=False):
        if meaning == "description":
            found[code] = current = {}
        elif code:
            current[code] = meaning.strip()
    lacking = {"admission_type_id", "discharge_disposition_id", "admission_source_id"} - set(found)
    if lacking:
        raise ClinicalError(f"{CODES} has no table of {min(lacking)}")
    return found
