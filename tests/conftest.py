"""pytest puts the folder of this file on the path: every test can say `from cases import ...`."""
