"""The intermediate representation: networks, layers and programs, their types, verification and data flow."""
