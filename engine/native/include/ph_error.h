/* The error contract of the native library.
 *
 * A function that can fail returns 0 (or a count) on success and -1 on failure,
 * and takes a `struct ph_error *` as its last argument. On failure it fills it:
 * `code` is an errno value (positive) and `message` says, in plain words and
 * with the numbers that matter, what was tried. On success it is untouched.
 * Resources are released by the cleanup attributes of src/cleanup.h; there are
 * no goto ladders. Nothing is printed.
 */
#ifndef PH_ERROR_H
#define PH_ERROR_H

/* cffi: begin */
struct ph_error {
	int code;
	char message[252];
};
/* cffi: end */

/* Fill *err; returns -1, so that a caller can `return ph_fail (err, errno, "open %s", path);`. */
int ph_fail (struct ph_error *err, int code, const char *format, ...)
	__attribute__ ((format (printf, 3, 4), cold));

#endif
