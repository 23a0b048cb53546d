"""Parsers and validation of the files of PEFT, which are not trusted."""
