"""Our ops inside other libraries' models; a module is named after the library it needs."""
