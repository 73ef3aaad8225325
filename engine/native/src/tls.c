/* TLS contexts: version 1.3 only, both ends prove themselves. */
#include <errno.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <stdlib.h>
#include <string.h>

#include "channel.h"

#define READ_BUFFER 262144      /* bytes that TLS takes from the socket at once */
#define CIPHERS "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

int
ph_tls_fail (struct ph_error *err, const char *what)
{
	unsigned long first = ERR_get_error ();
	int reason = ERR_GET_REASON (first), code = EPROTO;
	char text[160] = "no reason given";

	ERR_clear_error ();
	if (first)
		ERR_error_string_n (first, text, sizeof (text));
	switch (reason) {
	case SSL_R_CERTIFICATE_VERIFY_FAILED:
	case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
	case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
	case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
	case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
	case SSL_R_TLSV1_ALERT_ACCESS_DENIED:
	case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
		code = EACCES;
		break;
	case SSL_R_UNEXPECTED_EOF_WHILE_READING:
		code = ENOTCONN;
		break;
	}
	return ph_fail (err, code, "%s: %s", what, text);
}

/* Instead of a chain to an authority: the one certificate that was announced over SSH. */
static int
check_pin (X509_STORE_CTX *store, void *data)
{
	const struct ph_tls *tls = data;
	X509 *certificate = X509_STORE_CTX_get0_cert (store);
	unsigned char print[EVP_MAX_MD_SIZE];
	unsigned int size = 0;

	if (certificate && X509_digest (certificate, EVP_sha256 (), print, &size) && size == PH_PIN_SIZE
	    && CRYPTO_memcmp (print, tls->pin, PH_PIN_SIZE) == 0)
		return 1;
	X509_STORE_CTX_set_error (store, X509_V_ERR_APPLICATION_VERIFICATION);
	return 0;
}

static X509 *
read_certificate (const char *pem)
{
	BIO *bio = BIO_new_mem_buf (pem, -1);
	X509 *certificate = bio ? PEM_read_bio_X509 (bio, NULL, NULL, NULL) : NULL;

	BIO_free (bio);
	return certificate;
}

static int
use_identity (SSL_CTX *context, const char *certificate, const char *key)
{
	X509 *own = read_certificate (certificate);
	BIO *bio = BIO_new_mem_buf (key, -1);
	EVP_PKEY *private_key = bio ? PEM_read_bio_PrivateKey (bio, NULL, NULL, NULL) : NULL;
	int ok = own && private_key && SSL_CTX_use_certificate (context, own) == 1
		 && SSL_CTX_use_PrivateKey (context, private_key) == 1 && SSL_CTX_check_private_key (context) == 1;

	BIO_free (bio);
	X509_free (own);
	EVP_PKEY_free (private_key);
	return ok;
}

static void
set_options (SSL_CTX *context)
{
	SSL_CTX_set_options (context, SSL_OP_NO_TICKET | SSL_OP_ENABLE_KTLS);
	SSL_CTX_set_num_tickets (context, 0);
	SSL_CTX_set_session_cache_mode (context, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_mode (context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_default_read_buffer_len (context, READ_BUFFER);
	SSL_CTX_set_read_ahead (context, 1);
}

void
ph_tls_free (struct ph_tls *tls)
{
	if (!tls)
		return;
	SSL_CTX_free (tls->context);
	free (tls);
}

static int
set_up (struct ph_tls *tls, const char *certificate, const char *key, struct ph_error *err)
{
	if (!tls->context || !SSL_CTX_set_min_proto_version (tls->context, TLS1_3_VERSION)
	    || !SSL_CTX_set_max_proto_version (tls->context, TLS1_3_VERSION)
	    || !SSL_CTX_set_ciphersuites (tls->context, CIPHERS))
		return ph_tls_fail (err, "set up TLS 1.3");
	set_options (tls->context);
	SSL_CTX_set_verify (tls->context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
	SSL_CTX_set_cert_verify_callback (tls->context, check_pin, tls);
	if (!use_identity (tls->context, certificate, key))
		return ph_tls_fail (err, "use our certificate and key");
	return 0;
}

struct ph_tls *
ph_tls_new (int server, const char *certificate, const char *key, const uint8_t *pin, struct ph_error *err)
{
	struct ph_tls *tls = calloc (1, sizeof (*tls));

	if (!tls) {
		ph_fail (err, ENOMEM, "set up TLS");
		return NULL;
	}
	ERR_clear_error ();
	tls->server = server;
	memcpy (tls->pin, pin, PH_PIN_SIZE);
	tls->context = SSL_CTX_new (server ? TLS_server_method () : TLS_client_method ());
	if (set_up (tls, certificate, key, err) < 0) {
		ph_tls_free (tls);
		return NULL;
	}
	return tls;
}
