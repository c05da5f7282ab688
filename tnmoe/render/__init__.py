"""Tables and diagrams of plain data; nothing here knows a layer."""
