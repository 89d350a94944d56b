"""The entries of a model repository from the side of whoever fills it: checked, added, exported. No server runs here."""
