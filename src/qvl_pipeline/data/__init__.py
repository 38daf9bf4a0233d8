"""Messages schema, source readers, validation rules, the tokenised table, packing, the plan."""
