#include "ph_error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int
ph_fail (struct ph_error *err, int code, const char *format, ...)
{
	va_list args;

	va_start (args, format);
	int used = vsnprintf (err->message, sizeof (err->message), format, args);
	va_end (args);
	if (used < 0)
		used = 0;
	if ((size_t) used < sizeof (err->message))
		snprintf (err->message + used, sizeof (err->message) - used, ": %s", strerror (code));
	err->code = code;
	return -1;
}
