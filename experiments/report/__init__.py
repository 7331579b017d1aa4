"""Records in; tables, figures and one HTML page out. Reads record files only: never imports a model or the rest of
`experiments`, so a report can be made anywhere the records are."""
