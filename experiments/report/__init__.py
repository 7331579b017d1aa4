"""Records in; tables, figures and one HTML page out. Reads record files and conf/experiment/ only: never imports a model,
and of the rest of `experiments` only how rows are written and which settings are incidental, so a report can be made
anywhere the records are."""
