"""Cleaning of raw records: every removal and repair by a named rule, counted in an audit log.

As much is kept as can be: a missing value becomes a value of its own rather than a reason to drop its
row. Input rows are kept rows and the rows of the log, by construction and by test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from benchmarks.clinical.schema import DIAGNOSES, DRUGS, MISSING

UNKNOWN = "unknown"
Action = Literal["rows removed", "cells repaired", "column dropped", "column added"]
ENDED = ("11", "13", "14", "19", "20", "21")
"""Discharged by death or to hospice: cannot come back."""

VAGUE = ("Not Available", "NULL", "Not Mapped", "Unknown/Invalid")
"""Descriptions of codes that say nothing."""

CHAPTERS = (
    (1, 139, "infectious"),
    (140, 239, "neoplasms"),
    (240, 249, "endocrine"),
    (250, 250, "diabetes"),
    (251, 279, "endocrine"),
    (280, 289, "blood"),
    (290, 319, "mental"),
    (320, 389, "nervous and sense organs"),
    (390, 459, "circulatory"),
    (460, 519, "respiratory"),
    (520, 579, "digestive"),
    (580, 629, "genitourinary"),
    (630, 679, "pregnancy"),
    (680, 709, "skin"),
    (710, 739, "musculoskeletal"),
    (740, 759, "congenital"),
    (760, 779, "perinatal"),
    (780, 799, "symptoms"),
    (800, 999, "injury and poisoning"),
)
"""Of ICD-9, in order; diabetes is taken out of the endocrine ones."""


class Entry(BaseModel):
    """Rule of the audit log: the action, the number of rows or cells, and the reason."""

    model_config = ConfigDict(frozen=True)

    rule: str
    action: Action
    count: int
    reason: str


class Cleaned(BaseModel):
    """The table that is left, and the log of its cleaning."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    table: pd.DataFrame
    audit: tuple[Entry, ...]
    rows_in: int

    @property
    def removed(self) -> int:
        """Number of rows removed, by all rules."""
        return sum(entry.count for entry in self.audit if entry.action == "rows removed")


def chapter(code: str) -> str:
    """The ICD-9 chapter of a code, `unknown` where there is none."""
    if code == MISSING:
        return UNKNOWN
    if code[0] in "VE":
        return "supplementary" if code[0] == "V" else "external cause"
    number = int(code.partition(".")[0])
    return next((name for low, high, name in CHAPTERS if low <= number <= high), UNKNOWN)


def clean(raw: pd.DataFrame, codes: Mapping[str, Mapping[str, str]]) -> Cleaned:
    """Validated encounters, ready for models: text, whole numbers, and nobody's identifier.

    `patient` numbers the patients in the order in which they appear, so that splits can keep them
    together; `readmitted` is whether they came back within 30 days; `stay` numbers a patient's stays.
    """
    audit: list[Entry] = []
    table = raw.copy()

    def remove(rule: str, which: pd.Series, reason: str) -> None:
        nonlocal table
        audit.append(Entry(rule=rule, action="rows removed", count=int(which.sum()), reason=reason))
        table = table[~which].copy()

    def repair(rule: str, column: str, which: pd.Series, value: str, reason: str) -> None:
        audit.append(Entry(rule=rule, action="cells repaired", count=int(which.sum()), reason=reason))
        table.loc[which, column] = value

    def drop(rule: str, column: str, reason: str) -> None:
        nonlocal table
        audit.append(Entry(rule=rule, action="column dropped", count=len(table), reason=reason))
        table = table.drop(columns=column)

    others = [name for name in table if name != "encounter_id"]
    remove("repeated rows", table.duplicated(others), "the same stay under two numbers")
    remove("sex not recorded", table["gender"] == "Unknown/Invalid", "no subgroup to be told apart in")
    gone = table["discharge_disposition_id"].isin(ENDED)
    remove("death or hospice", gone, "these patients cannot be readmitted")

    for column, meanings in codes.items():
        words = table[column].map(meanings)
        repair(f"{column} not in {column}'s list", column, words.isna(), UNKNOWN, "no description")
        table[column] = words.fillna(UNKNOWN)
        vague = table[column].isin(VAGUE)
        repair(f"{column} says nothing", column, vague, UNKNOWN, "one code for what is not known")
    for column in ("race", "payer_code", "medical_specialty"):
        repair(f"{column} missing", column, table[column] == MISSING, UNKNOWN, "kept as its own value")
    for column in DIAGNOSES:
        grouped = table[column].map(chapter)
        missing = table[column] == MISSING
        repair(f"{column} missing", column, missing, UNKNOWN, "fewer diagnoses were made")
        table[column] = grouped
    weighed = table["weight"] != MISSING
    table["weight_recorded"] = weighed.map({True: "Yes", False: "No"})
    audit.append(
        Entry(
            rule="weight recorded",
            action="column added",
            count=int(weighed.sum()),
            reason="that it was taken says something of the ward",
        )
    )
    drop("weight", "weight", f"missing in {1 - weighed.mean():.0%} of rows: its values say little")
    for drug in DRUGS:
        if table[drug].nunique() < 2:
            drop(f"{drug} never given", drug, "a constant tells nothing")
    order = pd.to_numeric(table["encounter_id"])
    table = table.assign(_order=order).sort_values("_order", kind="stable").drop(columns="_order")
    table["patient"] = pd.factorize(table["patient_nbr"])[0]
    table["stay"] = table.groupby("patient").cumcount()
    for column in ("encounter_id", "patient_nbr"):
        drop(column, column, "an identifier; patients are numbered anew")
    table["readmitted"] = (table["readmitted"] == "<30").astype(int)
    for column in NUMBERS:
        table[column] = pd.to_numeric(table[column])
    return Cleaned(table=table.reset_index(drop=True), audit=tuple(audit), rows_in=len(raw))


def first_stays(cleaned: Cleaned) -> Cleaned:
    """Keep the first stay of each patient, for methods that take rows for independent."""
    later = cleaned.table["stay"] > 0
    entry = Entry(
        rule="later stays of a patient",
        action="rows removed",
        count=int(later.sum()),
        reason="rows of one patient are not independent",
    )
    table = cleaned.table[~later].reset_index(drop=True)
    return Cleaned(table=table, audit=(*cleaned.audit, entry), rows_in=cleaned.rows_in)


NUMBERS = (
    "time_in_hospital",
    "num_lab_procedures",
    "num_procedures",
    "num_medications",
    "number_outpatient",
    "number_emergency",
    "number_inpatient",
    "number_diagnoses",
)
