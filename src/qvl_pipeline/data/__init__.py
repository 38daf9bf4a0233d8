"""Messages schema, source readers, validation rules, tokenisation and label spans, packing, the plan."""
