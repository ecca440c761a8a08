"""WorldStrat's published files over HTTP: `worldstrat` names them, `fetch` resumes a file, `remote` sends a request."""
