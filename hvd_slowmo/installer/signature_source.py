r"""The signature of a request to Horovod's rendezvous server, in C++ and in Python: text that a patch inserts.

The header `X-Horovod-Signature` of a request holds two hexadecimal numbers with a colon between them: the SHA-256 hash
of the body, and the HMAC-SHA256 of "METHOD\nPATH\nHASH" under the job's secret. The server can thus refuse a request
before it reads the body. A response is signed in the same way, with "RESPONSE" as its method.
"""

from __future__ import annotations

SECRET = "_HOROVOD_SECRET_KEY"
"""Environment variable of the job's secret: Horovod's own name, which it keeps out of the workers' command lines."""

CPP = r"""// The signature of a request; horovod/runner/common/util/secret.py has the same in Python.
namespace horovod_signature
{
    inline std::string sha256(const std::string& data)
    {
        static const std::uint32_t constants[64] = {
            0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
            0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
            0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
            0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
            0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
            0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
            0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
            0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
        std::uint32_t hash[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
        const auto rotate = [](std::uint32_t x, int n) { return (x >> n) | (x << (32 - n)); };

        std::string padded = data;
        padded += '\x80';
        padded.append((119 - data.size() % 64) % 64, '\0');
        const std::uint64_t bits = static_cast<std::uint64_t>(data.size()) * 8;
        for (int shift = 56; shift >= 0; shift -= 8)
            padded += static_cast<char>(bits >> shift);

        for (std::size_t start = 0; start < padded.size(); start += 64)
        {
            std::uint32_t w[64];
            for (int i = 0; i < 16; ++i)
            {
                w[i] = 0;
                for (int j = 0; j < 4; ++j)
                    w[i] = (w[i] << 8) | static_cast<std::uint8_t>(padded[start + 4 * i + j]);
            }
            for (int i = 16; i < 64; ++i)
            {
                const auto s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
                const auto s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
                w[i] = w[i - 16] + s0 + w[i - 7] + s1;
            }
            std::uint32_t v[8];
            std::copy(hash, hash + 8, v);
            for (int i = 0; i < 64; ++i)
            {
                const auto s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
                const auto choice = (v[4] & v[5]) ^ (~v[4] & v[6]);
                const auto t1 = v[7] + s1 + choice + constants[i] + w[i];
                const auto s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
                const auto majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
                std::copy_backward(v, v + 7, v + 8);
                v[4] += t1;
                v[0] = t1 + s0 + majority;
            }
            for (int i = 0; i < 8; ++i)
                hash[i] += v[i];
        }

        std::string result;
        for (const auto word : hash)
            for (int shift = 24; shift >= 0; shift -= 8)
                result += static_cast<char>(word >> shift);
        return result;
    }

    inline std::string hmac(std::string key, const std::string& message)
    {
        if (key.size() > 64) key = sha256(key);
        key.resize(64, '\0');
        std::string inner, outer;
        for (const char c : key)
        {
            inner += static_cast<char>(c ^ 0x36);
            outer += static_cast<char>(c ^ 0x5c);
        }
        return sha256(outer + sha256(inner + message));
    }

    inline std::string hex(const std::string& data)
    {
        static const char digits[] = "0123456789abcdef";
        std::string result;
        for (const char c : data)
        {
            result += digits[static_cast<std::uint8_t>(c) >> 4];
            result += digits[static_cast<std::uint8_t>(c) & 15];
        }
        return result;
    }

    // The header's line, or nothing in a process that has no secret.
    inline std::string header(const std::string& method, const std::string& path, const std::string& body)
    {
        const char* key = std::getenv("_HOROVOD_SECRET_KEY");
        if (key == nullptr || *key == '\0') return "";
        const std::string digest = hex(sha256(body));
        return "X-Horovod-Signature: " + digest + ":" + hex(hmac(key, method + "\n" + path + "\n" + digest)) + "\r\n";
    }
}

"""

PYTHON = '''SIGNATURE_HEADER = 'X-Horovod-Signature'


def job_key():
    """The secret of the job. A launcher makes it, and its workers find it in their environment."""
    if not os.environ.get(HOROVOD_SECRET_KEY):
        os.environ[HOROVOD_SECRET_KEY] = make_secret_key().hex()
    return os.environ[HOROVOD_SECRET_KEY].encode()


def sign(method, path, body=b''):
    """The signature of a request; third_party/HTTPRequest/include/HTTPRequest.hpp has the same in C++."""
    body_digest = hashlib.sha256(body).hexdigest()
    message = '{}\\n{}\\n{}'.format(method, path, body_digest).encode()
    return '{}:{}'.format(body_digest, compute_digest(job_key(), message).hex())


def check_signature(signature, method, path):
    """True if the job's secret made the signature. The body is still to be compared, with check_body."""
    body_digest, _, mac = (signature or '').partition(':')
    message = '{}\\n{}\\n{}'.format(method, path, body_digest).encode()
    return hmac.compare_digest(compute_digest(job_key(), message).hex().encode(), mac.encode())


def check_body(signature, body):
    """True if the signature is that of this body."""
    return signature.partition(':')[0] == hashlib.sha256(body).hexdigest()


'''
