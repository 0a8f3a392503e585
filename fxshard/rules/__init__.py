"""What operators allow: the notation, the table, and the rules that are functions of shapes."""
